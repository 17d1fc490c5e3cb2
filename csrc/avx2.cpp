#include "avx2.h"

#include "avx512.h"

#ifdef LIBMOE_FAST_TILES

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "expert_tiles.h"
#include "packing.h"

#define LIBMOE_FAST_AVX2 __attribute__((target("avx2,fma")))

namespace libmoe_fast::avx2 {

namespace {

constexpr int kColumns = 16;  // that are multiplied at a time, by up to 6 rows: 12 accumulators, 2 right words, 1 left
// So many steps of both operands stay in the first-level cache, while the columns are multiplied in turn.
template <typename T>
constexpr int64_t kStepsPerSum = std::is_same_v<T, float> ? 256 : 128;

LIBMOE_FAST_AVX2 inline __m256i load_words(const uint32_t* words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

// The two values of each bf16 word, in float.
LIBMOE_FAST_AVX2 inline __m256 first_value(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
LIBMOE_FAST_AVX2 inline __m256 second_value(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

// row [kColumns] = sum, or row += sum
LIBMOE_FAST_AVX2 inline void store_sum(float* row, __m256 sum, bool add) {
  _mm256_storeu_ps(row, add ? _mm256_add_ps(_mm256_loadu_ps(row), sum) : sum);
}

// From the second-level cache: the first one's own guess stops at the stride of a step.
constexpr int kWordsAhead = 12 * kTileColumns;

// One step more: sum += left (x) right.
template <int kRows>
LIBMOE_FAST_AVX2 inline void add_products(__m256 (&sum)[kRows][2], const float* left, __m256 right0, __m256 right1) {
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const __m256 value = _mm256_broadcast_ss(left + i);
    sum[i][0] = _mm256_fmadd_ps(value, right0, sum[i][0]);
    sum[i][1] = _mm256_fmadd_ps(value, right1, sum[i][1]);
  }
}

// left: fp32 values [steps * kPerWord<T>, kTileRows].
template <int kRows, typename T>
LIBMOE_FAST_AVX2 void multiply(int64_t steps, const float* left, const uint32_t* right, float* tile, bool add,
                               Ahead ahead) {
  __m256 sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
  for (; steps > 0; --steps, left += kPerWord<T> * kTileRows, right += kTileColumns) {
    _mm_prefetch(ahead.data, _MM_HINT_T1);
    ahead.data += ahead.bytes_per_step;
    _mm_prefetch(reinterpret_cast<const char*>(right + kWordsAhead), _MM_HINT_T0);
    const __m256i words0 = load_words(right), words1 = load_words(right + 8);
    if constexpr (std::is_same_v<T, float>) {
      add_products<kRows>(sum, left, _mm256_castsi256_ps(words0), _mm256_castsi256_ps(words1));
    } else {
      add_products<kRows>(sum, left, first_value(words0), first_value(words1));
      add_products<kRows>(sum, left + kTileRows, second_value(words0), second_value(words1));
    }
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    store_sum(tile + i * kTileColumns, sum[i][0], add);
    store_sum(tile + i * kTileColumns + 8, sum[i][1], add);
  }
}

template <typename T>
using Multiply = void (*)(int64_t, const float*, const uint32_t*, float*, bool, Ahead);
template <typename T>
constexpr Multiply<T> kMultiply[] = {multiply<1, T>, multiply<2, T>, multiply<3, T>,
                                     multiply<4, T>, multiply<5, T>, multiply<6, T>};

// A left operand's words of bf16 in fp32: [2 * steps, kTileRows]. Once for all columns: their products need no room then.
LIBMOE_FAST_AVX2 void widen(int64_t steps, const uint32_t* left, float* wide) {
  constexpr int kLast = kTileRows - 8;  // the second half overlaps the first
  for (; steps > 0; --steps, left += kTileRows, wide += 2 * kTileRows) {
    const __m256i low = load_words(left), high = load_words(left + kLast);
    _mm256_storeu_ps(wide, first_value(low));
    _mm256_storeu_ps(wide + kLast, first_value(high));
    _mm256_storeu_ps(wide + kTileRows, second_value(low));
    _mm256_storeu_ps(wide + kTileRows + kLast, second_value(high));
  }
}

constexpr int kMostRows = 6;

// A part of the steps, some columns after the other.
template <typename T>
void multiply_part(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, bool add,
                   Ahead ahead) {
  alignas(32) float wide[std::is_same_v<T, float> ? 1 : 2 * kStepsPerSum<T> * kTileRows];
  const float* values = reinterpret_cast<const float*>(left);
  if constexpr (!std::is_same_v<T, float>) {
    widen(steps, left, wide);
    values = wide;
  }
  for (int column = 0; column < kTileColumns; column += kColumns) {
    int64_t pieces = divide_up(rows, kMostRows);
    for (int row = 0, count; row < rows; row += count) {
      count = static_cast<int>(divide_up(rows - row, pieces--));
      kMultiply<T>[count - 1](steps, values + row, right + column, tile + row * kTileColumns + column, add, ahead);
      ahead = {};  // fetched while the first are multiplied
    }
  }
}

Ahead after(Ahead ahead, int64_t steps) { return {ahead.data + steps * ahead.bytes_per_step, ahead.bytes_per_step}; }

// 8 x 8 words: row i of `block` becomes column i.
LIBMOE_FAST_AVX2 inline void transpose(__m256i (&block)[8]) {
  __m256i pairs[8], quads[8];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(block[i], block[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(block[i], block[i + 1]);
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    block[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    block[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

// The first `count` words: 8, or 6, which is what is left of a left operand.
LIBMOE_FAST_AVX2 inline void store_words(uint32_t* packed, int count, __m256i words) {
  if (count == 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), words);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(words));
  _mm_storeu_si64(packed + 4, _mm256_extracti128_si256(words, 1));
}

// Up to 8 rows of `bytes` bytes into words [step * width + row].
LIBMOE_FAST_AVX2 void pack_8_rows(const char* const* rows, int count, int64_t bytes, int64_t steps, int width, int columns,
                                  uint32_t* packed) {
  // As in packing.cpp: the rows of a weight that come next, fetched in order meanwhile.
  const bool adjacent = count >= 8 && rows[7] - rows[0] == 7 * bytes;
  const char* next = adjacent ? rows[0] + 8 * bytes : nullptr;
  int64_t step = 0;
  for (; (step + 8) * 4 <= bytes; step += 8) {
    if (next != nullptr) {
      for (int line = 0; line < 4; ++line) _mm_prefetch(next + step * 32 + line * 64, _MM_HINT_T1);
    }
    __m256i block[8];
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      block[i] = i < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + step * 4))
                           : _mm256_setzero_si256();
    }
    transpose(block);
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < 8; ++i) store_words(packed + (step + i) * width, columns, block[i]);
  }
  for (; step < steps; ++step) {
    for (int i = 0; i < columns; ++i) {
      uint32_t word = 0;
      if (i < count && step * 4 < bytes) std::memcpy(&word, rows[i] + step * 4, std::min<int64_t>(4, bytes - step * 4));
      packed[step * width + i] = word;
    }
  }
}

// kCount values of one row, or of two that are paired, in words.
template <int kCount>
LIBMOE_FAST_AVX2 inline void pair_words(const float* const* rows, int64_t column, uint32_t* packed) {
  std::memcpy(packed, rows[0] + column, kCount * 4);
}
template <int kCount>
LIBMOE_FAST_AVX2 inline void pair_words(const BFloat16* const* rows, int64_t column, uint32_t* packed) {
  const BFloat16 *even = rows[0] + column, *odd = rows[1] + column;
  for (int j = 0; j < kCount; ++j) packed[j] = even[j].x | static_cast<uint32_t>(odd[j].x) << 16;
}

inline uint32_t word_of(const float* const* rows, int64_t column) {
  uint32_t word = 0;
  if (rows[0] != nullptr) std::memcpy(&word, rows[0] + column, 4);
  return word;
}
inline uint32_t word_of(const BFloat16* const* rows, int64_t column) {
  const uint32_t even = rows[0] == nullptr ? 0 : rows[0][column].x, odd = rows[1] == nullptr ? 0 : rows[1][column].x;
  return even | odd << 16;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint32_t rounded(float value) { return BFloat16(value).x; }

}  // namespace

template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, Ahead ahead) {
  for (int64_t done = 0; done < steps; done += kStepsPerSum<T>) {
    multiply_part<T>(rows, std::min(kStepsPerSum<T>, steps - done), left + done * kTileRows,
                     right + done * kTileColumns, tile, done > 0, after(ahead, done));
  }
}

template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, Ahead ahead) {
  for (int64_t done = 0; done < steps; done += kStepsPerSum<T>) {
    const int64_t part = std::min(kStepsPerSum<T>, steps - done);
    uint32_t* words = packed + done * kTileColumns;
    pack_panel_across<T>(right + done * kPerWord<T>, column, kTileColumns, part, kTileColumns, words);
    multiply_part<T>(rows, part, left + done * kTileRows, words, tile, done > 0, after(ahead, done));
  }
}

template <typename T>
void pack_along(const T* const* rows, int count, int64_t elements, int64_t steps, int width, uint32_t* packed) {
  const auto* bytes = reinterpret_cast<const char* const*>(rows);
  for (int first = 0; first < width; first += 8) {
    pack_8_rows(bytes + first, std::clamp(count - first, 0, 8), elements * static_cast<int64_t>(sizeof(T)), steps, width,
                std::min(8, width - first), packed + first);
  }
}

template <typename T>
LIBMOE_FAST_AVX2 void pack_panel_across(const T* const* rows, int64_t column, int count, int64_t steps, int width,
                                        uint32_t* packed) {
  for (int64_t step = 0; step < steps; ++step, rows += kPerWord<T>, packed += width) {
    const bool there = rows[0] != nullptr && rows[kPerWord<T> - 1] != nullptr;
    if (there && count == kTileColumns) {
      pair_words<kTileColumns>(rows, column, packed);
    } else if (there && count == kTileRows && width == kTileRows) {
      pair_words<kTileRows>(rows, column, packed);
    } else {
      for (int j = 0; j < count; ++j) packed[j] = word_of(rows, column + j);
      std::fill(packed + count, packed + width, 0);
    }
  }
}

template <>
void pack_tile_along<float>(const float* tile, int rows, uint32_t* packed) {
  for (int column = 0; column < kTileColumns; ++column, packed += kTileRows) {
    for (int row = 0; row < kTileRows; ++row) packed[row] = row < rows ? bits_of(tile[row * kTileColumns + column]) : 0;
  }
}

template <>
void pack_tile_along<BFloat16>(const float* tile, int rows, uint32_t* packed) {
  for (int column = 0; column < kTileColumns; column += 2, packed += kTileRows) {
    for (int row = 0; row < kTileRows; ++row) {
      const float* pair = tile + row * kTileColumns + column;
      packed[row] = row < rows ? rounded(pair[0]) | rounded(pair[1]) << 16 : 0;
    }
  }
}

template <>
void pack_tile_across<float>(const float* tile, int rows, uint32_t* packed) {
  for (int row = 0; row < rows + rows % 2; ++row) {
    for (int j = 0; j < kTileColumns; ++j) {
      packed[row * kTileColumns + j] = row < rows ? bits_of(tile[row * kTileColumns + j]) : 0;
    }
  }
}

template <>
LIBMOE_FAST_AVX2 void pack_tile_across<BFloat16>(const float* tile, int rows, uint32_t* packed) {
  for (int row = 0; row < rows; row += 2, tile += 2 * kTileColumns, packed += kTileColumns) {
    const bool pair = row + 1 < rows;
    for (int j = 0; j < kTileColumns; ++j) {
      packed[j] = rounded(tile[j]) | (pair ? rounded(tile[kTileColumns + j]) << 16 : 0);
    }
  }
}

#define LIBMOE_FAST_INSTANTIATE(T)                                                                                     \
  template void multiply_tile<T>(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead);                       \
  template void multiply_tile_packing<T>(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*,   \
                                         Ahead);                                                                       \
  template void pack_along<T>(const T* const*, int, int64_t, int64_t, int, uint32_t*);                                 \
  template void pack_panel_across<T>(const T* const*, int64_t, int, int64_t, int, uint32_t*);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(BFloat16)

}  // namespace libmoe_fast::avx2

#endif
