#include "packing.h"

#include <algorithm>

#include "avx512.h"
#include "narrow.h"
#include "sanitizer.h"

namespace libmoe_fast {

#ifdef LIBMOE_FAST_AVX512

namespace {

// The first elements of a row, as many as the mask has bits, zeros after them.
LIBMOE_FAST_AVX512 inline __m512i load_halves(__mmask32 valid, const void* row) {
  check_read(row, __builtin_popcount(valid) * 2);
  return _mm512_maskz_loadu_epi16(valid, row);
}

LIBMOE_FAST_AVX512 inline __m512 load_floats(__mmask16 valid, const float* row) {
  check_read(row, __builtin_popcount(valid) * 4);
  return _mm512_maskz_loadu_ps(valid, row);
}

LIBMOE_FAST_AVX512 inline void store_words(uint32_t* packed, __mmask16 columns, __m512i words) {
  check_write(packed, __builtin_popcount(columns) * 4);
  _mm512_mask_storeu_epi32(packed, columns, words);
}

// 16 x 16 words: row i of `block` becomes column i.
LIBMOE_FAST_AVX512 inline void transpose(__m512i (&block)[16]) {
  __m512i pairs[16], quads[16];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(block[i], block[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(block[i], block[i + 1]);
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    // Lane l of quads[i + 4q] holds column 4l + i of rows 4q to 4q + 3.
    const __m512i low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
    block[i] = _mm512_shuffle_i32x4(low, high, 0x88);
    block[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    block[i + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    block[i + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

// Up to 16 rows of `bytes` bytes into words [step * width + row].
LIBMOE_FAST_AVX512 void pack_16_rows(const char* const* rows, int count, int64_t bytes, int64_t steps, int width,
                                     __mmask16 columns, uint32_t* packed) {
  // Rows a page apart are read too haphazardly for the processor to foresee; those of a weight lie one after the other,
  // so the 16 after these, most likely packed next, can be fetched in order meanwhile.
  const bool adjacent = count >= 16 && rows[15] - rows[0] == 15 * bytes;
  const char* next = adjacent ? rows[0] + 16 * bytes : nullptr;
  for (int64_t step = 0; step < steps; step += 16) {
    const int64_t halves = std::clamp<int64_t>((bytes - step * 4) / 2, 0, 32);  // 16-bit units left in these rows
    const __mmask32 valid = halves == 32 ? ~__mmask32{0} : (__mmask32{1} << halves) - 1;
    if (next != nullptr) {
      for (int line = 0; line < 16; ++line) _mm_prefetch(next + step * 64 + line * 64, _MM_HINT_T1);
    }
    __m512i block[16];
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      block[i] = i < count ? load_halves(valid, rows[i] + step * 4) : _mm512_setzero_si512();
    }
    transpose(block);
    uint32_t* out = packed + step * width;
    const int64_t left = std::min<int64_t>(16, steps - step);
    if (left == 16) {
      LIBMOE_FAST_UNROLL
      for (int i = 0; i < 16; ++i) store_words(out + i * width, columns, block[i]);
    } else {
      for (int i = 0; i < left; ++i) store_words(out + i * width, columns, block[i]);
    }
  }
}

template <typename T>
void pack_rows(const T* const* rows, int count, int64_t elements, int64_t steps, int width, uint32_t* packed) {
  const auto* bytes = reinterpret_cast<const char* const*>(rows);
  for (int first = 0; first < width; first += 16) {
    const auto columns = static_cast<__mmask16>((1u << std::min(16, width - first)) - 1);
    pack_16_rows(bytes + first, std::max(0, count - first), elements * static_cast<int64_t>(sizeof(T)), steps, width,
                 columns, packed + first);
  }
}

LIBMOE_FAST_AVX512 inline __m512i load_or_zero(__mmask32 valid, const void* row) {
  return row == nullptr ? _mm512_setzero_si512() : load_halves(valid, row);
}

LIBMOE_FAST_AVX512 void pack_across_words(const BFloat16* const* rows, int64_t column, int count, int64_t steps,
                                          int64_t steps_left, int width, uint32_t* packed) {
  const __m512i first = _mm512_load_si512(kInterleave.low), second = _mm512_load_si512(kInterleave.high);
  const __mmask32 valid = count == 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
  const __mmask16 columns = width >= 16 ? __mmask16(~0) : static_cast<__mmask16>((1u << width) - 1);
  for (int64_t step = 0; step < steps; ++step, packed += width, rows += 2) {
    if (step + kRowsAhead / 2 < steps_left) {
      fetch_early(rows[kRowsAhead], column);
      fetch_early(rows[kRowsAhead + 1], column);
    }
    const __m512i even = load_or_zero(valid, rows[0] == nullptr ? nullptr : rows[0] + column);
    const __m512i odd = load_or_zero(valid, rows[1] == nullptr ? nullptr : rows[1] + column);
    store_words(packed, columns, _mm512_permutex2var_epi16(even, first, odd));
    if (width > 16) _mm512_storeu_si512(packed + 16, _mm512_permutex2var_epi16(even, second, odd));
  }
}

LIBMOE_FAST_AVX512 void pack_across_words(const float* const* rows, int64_t column, int count, int64_t steps,
                                          int64_t steps_left, int width, uint32_t* packed) {
  const auto mask = [](int bits) { return static_cast<__mmask16>((1u << std::clamp(bits, 0, 16)) - 1); };
  const __mmask16 low = mask(count), high = mask(count - 16), columns = mask(width);
  for (int64_t step = 0; step < steps; ++step, packed += width) {
    if (step + kRowsAhead < steps_left) {
      fetch_early(rows[step + kRowsAhead], column);
      fetch_early(rows[step + kRowsAhead], column + 16);
    }
    const bool zero = rows[step] == nullptr;
    const float* row = zero ? nullptr : rows[step] + column;
    const __m512 left = zero ? _mm512_setzero_ps() : load_floats(low, row);
    store_words(packed, columns, _mm512_castps_si512(left));
    if (width > 16) _mm512_storeu_ps(packed + 16, zero ? _mm512_setzero_ps() : load_floats(high, row + 16));
  }
}

// A row of a tile in words: 16 that hold two values each, or 16 values from `column` on.
LIBMOE_FAST_AVX512_BF16 inline __m512i row_words(const float* tile, int row, int rows) {
  return row < rows ? round_to_bf16(tile + row * kTileColumns) : _mm512_setzero_si512();
}

LIBMOE_FAST_AVX512 inline __m512i row_values(const float* tile, int row, int rows, int column) {
  if (row >= rows) return _mm512_setzero_si512();
  return _mm512_castps_si512(_mm512_loadu_ps(tile + row * kTileColumns + column));
}

// 16 steps of a left operand.
LIBMOE_FAST_AVX512 inline void store_columns(__m512i (&block)[16], uint32_t* packed) {
  constexpr __mmask16 kRows = (1u << kTileRows) - 1;
  transpose(block);
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 16; ++i) store_words(packed + i * kTileRows, kRows, block[i]);
}

LIBMOE_FAST_AVX512_BF16 void pack_tile_in_strip_words(const float* tile, int rows, uint32_t* packed, BFloat16) {
  __m512i block[16];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 16; ++i) block[i] = row_words(tile, i, rows);
  store_columns(block, packed);
}

LIBMOE_FAST_AVX512 void pack_tile_in_strip_words(const float* tile, int rows, uint32_t* packed, float) {
  for (int column = 0; column < kTileColumns; column += 16) {
    __m512i block[16];
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < 16; ++i) block[i] = row_values(tile, i, rows, column);
    store_columns(block, packed + column * kTileRows);
  }
}

LIBMOE_FAST_AVX512_BF16 void pack_tile_in_panel_words(const float* tile, int rows, uint32_t* packed, BFloat16) {
  const __m512i first = _mm512_load_si512(kInterleave.low), second = _mm512_load_si512(kInterleave.high);
  for (int row = 0; row < rows; row += 2, packed += kTileColumns) {
    const __m512i even = row_words(tile, row, rows), odd = row_words(tile, row + 1, rows);
    _mm512_storeu_si512(packed, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_storeu_si512(packed + 16, _mm512_permutex2var_epi16(even, second, odd));
  }
}

LIBMOE_FAST_AVX512 void pack_tile_in_panel_words(const float* tile, int rows, uint32_t* packed, float) {
  for (int row = 0; row < rows + rows % 2; ++row, packed += kTileColumns) {
    _mm512_storeu_si512(packed, row_values(tile, row, rows, 0));
    _mm512_storeu_si512(packed + 16, row_values(tile, row, rows, 16));
  }
}

}  // namespace

#endif

template <typename T>
void pack_tile_in_strip(const float* tile, int rows, int64_t step, int64_t steps, uint32_t* packed) {
#ifdef LIBMOE_FAST_AVX512
  if (has_avx512()) return pack_tile_in_strip_words(tile, rows, packed + step * kTileRows, T());
#endif
  narrow::pack_tile_in_strip<T>(tile, rows, step, steps, packed);
}

template <typename T>
void pack_tile_in_panel(const float* tile, int rows, int64_t step, int64_t steps, uint32_t* packed) {
#ifdef LIBMOE_FAST_AVX512
  if (has_avx512()) return pack_tile_in_panel_words(tile, rows, packed + step * kTileColumns, T());
#endif
  narrow::pack_tile_in_panel<T>(tile, rows, step, steps, packed);
}

template <typename T>
void pack_strip(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
#ifdef LIBMOE_FAST_AVX512
  if (has_avx512()) return pack_rows(rows, count, elements, steps, kTileRows, packed);
#endif
  narrow::pack_strip<T>(rows, count, elements, steps, packed);
}

template <typename T>
void pack_panel(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
#ifdef LIBMOE_FAST_AVX512
  if (has_avx512()) return pack_rows(rows, count, elements, steps, kTileColumns, packed);
#endif
  narrow::pack_panel<T>(rows, count, elements, steps, packed);
}

namespace {

// Strips or panels of `width` columns, with what packs a few steps of one without AVX-512.
template <typename T>
void pack_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, int width, uint32_t* packed,
                 void (*narrow_pack)(const T* const*, int64_t, int, int64_t, int64_t, int64_t, uint32_t*)) {
  // Rows that all strips or panels read before the next ones: neighbours in memory. Few, and fetched to the second-level cache: rows
  // a power of two apart all share a dozen places of the first.
  constexpr int64_t kBlockSteps = 8;
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    const int64_t end = std::min(steps, step + kBlockSteps);
    for (int64_t first = 0; first < columns; first += width) {
      const auto count = static_cast<int>(std::min<int64_t>(width, columns - first));
      uint32_t* words = packed + first * steps;
#ifdef LIBMOE_FAST_AVX512
      if (has_avx512()) {
        pack_across_words(rows + step * kPerWord<T>, column + first, count, end - step, steps - step, width,
                          words + step * width);
        continue;
      }
#endif
      narrow_pack(rows, column + first, count, step, end, steps, words);
    }
  }
}

}  // namespace

template <typename T>
void pack_strips_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, uint32_t* packed) {
  pack_across<T>(rows, column, columns, steps, strip_rows(), packed, narrow::pack_strip_across<T>);
}

template <typename T>
void pack_panels_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, uint32_t* packed) {
  pack_across<T>(rows, column, columns, steps, kTileColumns, packed, narrow::pack_panel_across<T>);
}

#define LIBMOE_FAST_INSTANTIATE(T)                                                                \
  template void pack_strip<T>(const T* const*, int, int64_t, int64_t, uint32_t*);                 \
  template void pack_panel<T>(const T* const*, int, int64_t, int64_t, uint32_t*);                 \
  template void pack_strips_across<T>(const T* const*, int64_t, int64_t, int64_t, uint32_t*);     \
  template void pack_panels_across<T>(const T* const*, int64_t, int64_t, int64_t, uint32_t*);     \
  template void pack_tile_in_strip<T>(const float*, int, int64_t, int64_t, uint32_t*);            \
  template void pack_tile_in_panel<T>(const float*, int, int64_t, int64_t, uint32_t*);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(BFloat16)

}  // namespace libmoe_fast
