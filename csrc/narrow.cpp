#include "narrow.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "expert_tiles.h"
#include "packing.h"
#include "vectors.h"

namespace libmoe_fast::narrow {

#ifdef LIBMOE_FAST_NARROW

namespace {

constexpr int kColumns = 16;  // that are multiplied at a time, by up to kMostRows rows
// So many steps of both operands stay in the first-level cache, while the columns are multiplied in turn.
template <typename T>
constexpr int64_t kStepsPerSum = std::is_same_v<T, float> ? 256 : 128;

// row [kColumns] = sum, or row += sum
LIBMOE_FAST_VECTORS inline void store_sum(float* row, Floats sum, bool add_to_it) {
  store_floats(row, add_to_it ? add(load_floats(row), sum) : sum);
}

// From the second-level cache: the first one's own guess stops at the stride of a step.
constexpr int kWordsAhead = 12 * kTileColumns;

// left: fp32 values [steps * kPerWord<T>, kTileRows].
template <int kRows, typename T>
LIBMOE_FAST_VECTORS void multiply(int64_t steps, const float* left, const uint32_t* right, float* tile, bool add,
                               Ahead ahead) {
  Floats sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = zeros();
  for (; steps > 0; --steps, left += kPerWord<T> * kTileRows, right += kTileColumns) {
    __builtin_prefetch(ahead.data, 0, 2);
    ahead.data += ahead.bytes_per_step;
    __builtin_prefetch(right + kWordsAhead);
    const Words words0 = load_words(right), words1 = load_words(right + 8);
    if constexpr (std::is_same_v<T, float>) {
      add_products<kRows>(sum, left, as_floats(words0), as_floats(words1));
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
template <typename T, int... kRows>
constexpr std::array<Multiply<T>, sizeof...(kRows)> multiplications(std::integer_sequence<int, kRows...>) {
  return {multiply<kRows + 1, T>...};
}
template <typename T>
constexpr auto kMultiply = multiplications<T>(std::make_integer_sequence<int, kMostRows<T>>());

// A left operand's words of bf16 in fp32: [2 * steps, kTileRows]. Once for all columns: their products need no room then.
LIBMOE_FAST_VECTORS void widen(int64_t steps, const uint32_t* left, float* wide) {
  constexpr int kLast = kTileRows - 8;  // the second half overlaps the first
  for (; steps > 0; --steps, left += kTileRows, wide += 2 * kTileRows) {
    const Words low = load_words(left), high = load_words(left + kLast);
    store_floats(wide, first_value(low));
    store_floats(wide + kLast, first_value(high));
    store_floats(wide + kTileRows, second_value(low));
    store_floats(wide + kTileRows + kLast, second_value(high));
  }
}

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
    int64_t pieces = divide_up(rows, kMostRows<T>);
    for (int row = 0, count; row < rows; row += count) {
      count = static_cast<int>(divide_up(rows - row, pieces--));
      kMultiply<T>[count - 1](steps, values + row, right + column, tile + row * kTileColumns + column, add, ahead);
      ahead = {};  // fetched while the first are multiplied
    }
  }
}

Ahead after(Ahead ahead, int64_t steps) { return {ahead.data + steps * ahead.bytes_per_step, ahead.bytes_per_step}; }

// Up to 8 rows of `bytes` bytes into words [step * width + row].
LIBMOE_FAST_VECTORS void pack_8_rows(const char* const* rows, int count, int64_t bytes, int64_t steps, int width, int columns,
                                  uint32_t* packed) {
  // As in packing.cpp: the rows of a weight that come next, fetched in order meanwhile.
  const bool adjacent = count >= 8 && rows[7] - rows[0] == 7 * bytes;
  const char* next = adjacent ? rows[0] + 8 * bytes : nullptr;
  int64_t step = 0;
  for (; (step + 8) * 4 <= bytes; step += 8) {
    if (next != nullptr) {
      for (int line = 0; line < 4; ++line) __builtin_prefetch(next + step * 32 + line * 64, 0, 2);
    }
    Words block[8];
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      block[i] = i < count ? load_words(rows[i] + step * 4) : no_words();
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
LIBMOE_FAST_VECTORS inline void pair_words(const float* const* rows, int64_t column, uint32_t* packed) {
  std::memcpy(packed, rows[0] + column, kCount * 4);
}
template <int kCount>
LIBMOE_FAST_VECTORS inline void pair_words(const BFloat16* const* rows, int64_t column, uint32_t* packed) {
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
LIBMOE_FAST_VECTORS void pack_panel_across(const T* const* rows, int64_t column, int count, int64_t steps, int width,
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
LIBMOE_FAST_VECTORS void pack_tile_across<BFloat16>(const float* tile, int rows, uint32_t* packed) {
  for (int row = 0; row < rows; row += 2, tile += 2 * kTileColumns, packed += kTileColumns) {
    const bool pair = row + 1 < rows;
    for (int j = 0; j < kTileColumns; ++j) {
      packed[j] = rounded(tile[j]) | (pair ? rounded(tile[kTileColumns + j]) << 16 : 0);
    }
  }
}

#else  // Never called: tiles_pay says no.

namespace {

[[noreturn]] void not_here() { throw std::logic_error("libmoe_fast: tiles are not used on this machine"); }

}  // namespace

template <typename T>
void multiply_tile(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead) {
  not_here();
}

template <typename T>
void multiply_tile_packing(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*, Ahead) {
  not_here();
}

template <typename T>
void pack_along(const T* const*, int, int64_t, int64_t, int, uint32_t*) {
  not_here();
}

template <typename T>
void pack_panel_across(const T* const*, int64_t, int, int64_t, int, uint32_t*) {
  not_here();
}

template <typename T>
void pack_tile_along(const float*, int, uint32_t*) {
  not_here();
}

template <typename T>
void pack_tile_across(const float*, int, uint32_t*) {
  not_here();
}

template void pack_tile_along<float>(const float*, int, uint32_t*);
template void pack_tile_along<BFloat16>(const float*, int, uint32_t*);
template void pack_tile_across<float>(const float*, int, uint32_t*);
template void pack_tile_across<BFloat16>(const float*, int, uint32_t*);

#endif

#define LIBMOE_FAST_INSTANTIATE(T)                                                                                     \
  template void multiply_tile<T>(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead);                       \
  template void multiply_tile_packing<T>(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*,   \
                                         Ahead);                                                                       \
  template void pack_along<T>(const T* const*, int, int64_t, int64_t, int, uint32_t*);                                 \
  template void pack_panel_across<T>(const T* const*, int64_t, int, int64_t, int, uint32_t*);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(BFloat16)

}  // namespace libmoe_fast::narrow
