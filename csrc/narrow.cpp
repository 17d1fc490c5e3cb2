#include "narrow.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <type_traits>

#include "expert_tiles.h"
#include "packing.h"
#include "vectors.h"

namespace libmoe_fast::narrow {

#ifdef LIBMOE_FAST_NARROW

namespace {

// A piece of a strip, up to kMostRows rows, and one of a panel, kColumns columns, are multiplied at a time. So each lies by
// itself, all steps of the first piece before those of the second: in one sequence, the pieces' lines would alternate, and
// those of one fit only half the places of the first-level cache. That cost 4% where a panel fits the second level, 14%
// where it does not.
constexpr int kColumns = 16;
constexpr int64_t kStepsPerSum = 512;  // at most: sums of sums lose less than one long sum; shorter ones begin too often

// Rows of a strip's first piece; the second has the rest. Either has room for kMostRows.
int rows_per_piece(int rows) {
  static_assert(kNarrowRows == 2 * kMostRows && kTileColumns == 2 * kColumns);
  return rows > kMostRows ? static_cast<int>(divide_up(rows, 2)) : rows;
}

// row [kColumns] = sum, or row += sum
LIBMOE_FAST_VECTORS inline void store_sum(float* row, Floats sum, bool add_to_it) {
  store_floats(row, add_to_it ? add(load_floats(row), sum) : sum);
}

template <int kRows>
LIBMOE_FAST_VECTORS void multiply(int64_t steps, const float* left, const float* right, float* tile, bool add) {
  Floats sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = zeros();
  for (; steps > 0; --steps, left += kMostRows, right += kColumns) {
    add_products<kRows>(sum, left, load_floats(right), load_floats(right + 8));
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    store_sum(tile + i * kTileColumns, sum[i][0], add);
    store_sum(tile + i * kTileColumns + 8, sum[i][1], add);
  }
}

using Multiply = void (*)(int64_t, const float*, const float*, float*, bool);
template <int... kRows>
constexpr std::array<Multiply, sizeof...(kRows)> multiplications(std::integer_sequence<int, kRows...>) {
  return {multiply<kRows + 1>...};
}
constexpr auto kMultiply = multiplications(std::make_integer_sequence<int, kMostRows>());

// A call's share of the lines to fetch ahead during `steps` steps, between its multiplications: within, each would take
// the place of a product.
class Fetch {
 public:
  Fetch(const Ahead& ahead, int64_t steps, int64_t multiplications)
      : ahead_(ahead),
        line_(steps * ahead.call / ahead.calls),
        end_(ahead.data == nullptr ? line_ : steps * (ahead.call + 1) / ahead.calls),
        each_(divide_up(end_ - line_, multiplications)) {}

  void next() {
    for (const int64_t last = std::min(end_, line_ + each_); line_ < last; ++line_) {
      __builtin_prefetch(ahead_.data + line_ * ahead_.bytes_per_step, 0, 2);
    }
  }

 private:
  Ahead ahead_;
  int64_t line_, end_, each_;
};

// A packed operand from some step on. `size`: values from one piece to the next.
struct Pieces {
  const float* values;
  int64_t size;
};

// A part of the steps: a piece of the left operand, which stays in the first-level cache, times both of the right one.
void multiply_part(int rows, int64_t steps, Pieces left, Pieces right, float* tile, bool add, const Ahead& ahead) {
  const int each = rows_per_piece(rows);
  Fetch fetch(ahead, steps, divide_up(rows, each) * kTileColumns / kColumns);
  for (int row = 0; row < rows; row += each, left.values += left.size) {
    const float* values = right.values;
    for (int column = 0; column < kTileColumns; column += kColumns, values += right.size) {
      fetch.next();
      kMultiply[std::min(each, rows - row) - 1](steps, left.values, values, tile + row * kTileColumns + column, add);
    }
  }
}

// Calls multiply_part for all steps, and before each prepare(steps before it, steps of it).
template <typename Prepare>
void multiply_in_parts(int rows, int64_t steps, const uint32_t* left, const Panel& right, float* tile,
                       const Ahead& ahead, const Prepare& prepare) {
  const auto* lefts = reinterpret_cast<const float*>(left);
  const auto* rights = reinterpret_cast<const float*>(right.words) + right.first * kColumns;
  const int64_t even = divide_up(steps, divide_up(steps, kStepsPerSum));
  for (int64_t done = 0; done < steps; done += even) {
    const int64_t part = std::min(even, steps - done);
    prepare(done, done + part);
    multiply_part(rows, part, {lefts + done * kMostRows, steps * kMostRows},
                  {rights + done * kColumns, right.steps * kColumns}, tile, done > 0, ahead.after(done));
  }
}

// 8 x 8 values: row i becomes a step's values of a piece, from `first` on; only kMostRows in a strip's.
template <int kWidth>
LIBMOE_FAST_VECTORS inline void store_transposed(Words (&block)[8], int first, float* piece) {
  static_assert(kWidth == kMostRows || kWidth % 8 == 0);
  transpose(block);
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 8; ++i) {
    float* values = piece + i * kWidth + first;
    kWidth == kMostRows ? store_six(values, as_floats(block[i])) : store_floats(values, as_floats(block[i]));
  }
}

// A few steps of all rows are packed at a time: that part of the packed operand stays in the first-level cache until its
// lines are full.
constexpr int64_t kBlockSteps = 64;

// Up to 8 rows, the steps from `step` to `end`. Fetches the next ones: rows a page apart are read too haphazardly for the
// processor to foresee.
template <int kWidth, typename T>
LIBMOE_FAST_VECTORS void pack_8_rows(const T* const* rows, int count, int64_t elements, int64_t step, int64_t end,
                                     int first, float* packed) {
  if (end + kBlockSteps <= elements) {
    for (int i = 0; i < count; ++i) {
      for (int64_t line = 0; line < kBlockSteps * int64_t{sizeof(T)}; line += kCacheLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows[i] + end) + line);
      }
    }
  }
  for (; step + 8 <= std::min(end, elements); step += 8) {
    Words block[8];
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < 8; ++i) block[i] = i < count ? load_values(rows[i] + step) : no_words();
    store_transposed<kWidth>(block, first, packed + step * kWidth);
  }
  for (; step < end; ++step) {
    for (int i = 0; i < std::min(8, kWidth - first); ++i) {
      packed[step * kWidth + first + i] = i < count && step < elements ? static_cast<float>(rows[i][step]) : 0.0f;
    }
  }
}

// `count` values of a row from `column` on; zeros for the rest, and for a null row.
template <int kWidth, typename T>
LIBMOE_FAST_VECTORS inline void pack_values(const T* __restrict__ row, int64_t column, int count,
                                            float* __restrict__ values) {
  if (row != nullptr && count == kWidth) {
    for (int j = 0; j < kWidth; ++j) values[j] = static_cast<float>(row[column + j]);
  } else {
    for (int j = 0; j < kWidth; ++j) values[j] = row != nullptr && j < count ? static_cast<float>(row[column + j]) : 0.0f;
  }
}

// Eight values of a result, rounded to T.
template <typename T>
LIBMOE_FAST_VECTORS inline Words load_rounded(const float* values) {
  const Words words = load_values(values);
  return std::is_same_v<T, float> ? words : round_to_bf16(words);
}

}  // namespace

void multiply_tile(int rows, int64_t steps, const uint32_t* left, const Panel& right, float* tile, const Ahead& ahead) {
  multiply_in_parts(rows, steps, left, right, tile, ahead, [](int64_t, int64_t) {});
}

template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, const Ahead& ahead) {
  multiply_in_parts(rows, steps, left, {packed, steps}, tile, ahead, [=](int64_t step, int64_t end) {
    pack_panel_across(right, column, kTileColumns, step, end, steps, packed);
  });
}

template <typename T>
void pack_strip(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
  const int each = rows_per_piece(count);
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    auto* piece = reinterpret_cast<float*>(packed);
    for (int row = 0; row < count; row += each, piece += steps * kMostRows) {
      pack_8_rows<kMostRows>(rows + row, std::min(each, count - row), elements, step,
                             std::min(steps, step + kBlockSteps), 0, piece);
    }
  }
}

template <typename T>
void pack_panel(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    for (int row = 0; row < kTileColumns; row += 8) {
      pack_8_rows<kColumns>(rows + row, std::clamp(count - row, 0, 8), elements, step,
                            std::min(steps, step + kBlockSteps), row % kColumns,
                            reinterpret_cast<float*>(packed) + row / kColumns * steps * kColumns);
    }
  }
}

template <typename T>
LIBMOE_FAST_VECTORS void pack_strip_across(const T* const* rows, int64_t column, int count, int64_t step, int64_t end,
                                           int64_t steps, uint32_t* packed) {
  const int each = rows_per_piece(count);
  for (; step < end; ++step) {
    if (step + kRowsAhead < steps) fetch_early(rows[step + kRowsAhead], column);
    float* values = reinterpret_cast<float*>(packed) + step * kMostRows;
    for (int row = 0; row < count; row += each, values += steps * kMostRows) {
      pack_values<kMostRows>(rows[step], column + row, std::min(each, count - row), values);
    }
  }
}

template <typename T>
LIBMOE_FAST_VECTORS void pack_panel_across(const T* const* rows, int64_t column, int count, int64_t step, int64_t end,
                                           int64_t steps, uint32_t* packed) {
  for (; step < end; ++step) {
    if (step + kRowsAhead < steps) fetch_early(rows[step + kRowsAhead], column);
    float* values = reinterpret_cast<float*>(packed) + step * kColumns;
    for (int first = 0; first < kTileColumns; first += kColumns, values += steps * kColumns) {
      pack_values<kColumns>(rows[step], column + first, std::clamp(count - first, 0, kColumns), values);
    }
  }
}

template <typename T>
LIBMOE_FAST_VECTORS void pack_tile_in_strip(const float* tile, int rows, int64_t step, int64_t steps,
                                            uint32_t* packed) {
  const int each = rows_per_piece(rows);
  for (int column = 0; column < kTileColumns; column += 8) {
    float* piece = reinterpret_cast<float*>(packed) + (step + column) * kMostRows;
    for (int row = 0; row < rows; row += each, piece += steps * kMostRows) {
      const int count = std::min(each, rows - row);
      Words block[8];
      LIBMOE_FAST_UNROLL
      for (int i = 0; i < 8; ++i) {
        block[i] = i < count ? load_rounded<T>(tile + (row + i) * kTileColumns + column) : no_words();
      }
      store_transposed<kMostRows>(block, 0, piece);
    }
  }
}

template <typename T>
LIBMOE_FAST_VECTORS void pack_tile_in_panel(const float* tile, int rows, int64_t step, int64_t steps,
                                            uint32_t* packed) {
  for (int row = 0; row < rows + rows % 2; ++row) {
    for (int column = 0; column < kTileColumns; column += 8) {
      uint32_t* words = packed + (column / kColumns * steps + step + row) * kColumns + column % kColumns;
      store_words(words, row < rows ? load_rounded<T>(tile + row * kTileColumns + column) : no_words());
    }
  }
}

#else  // Never called: tiles_pay says no.

namespace {

[[noreturn]] void not_here() { throw std::logic_error("libmoe_fast: tiles are not used on this machine"); }

}  // namespace

void multiply_tile(int, int64_t, const uint32_t*, const Panel&, float*, const Ahead&) { not_here(); }

template <typename T>
void multiply_tile_packing(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*, const Ahead&) {
  not_here();
}

template <typename T>
void pack_strip(const T* const*, int, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_panel(const T* const*, int, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_strip_across(const T* const*, int64_t, int, int64_t, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_panel_across(const T* const*, int64_t, int, int64_t, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_tile_in_strip(const float*, int, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_tile_in_panel(const float*, int, int64_t, int64_t, uint32_t*) {
  not_here();
}

#endif

#define LIBMOE_FAST_INSTANTIATE(T)                                                                                     \
  template void multiply_tile_packing<T>(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*,   \
                                         const Ahead&);                                                                \
  template void pack_strip<T>(const T* const*, int, int64_t, int64_t, uint32_t*);                                      \
  template void pack_panel<T>(const T* const*, int, int64_t, int64_t, uint32_t*);                                      \
  template void pack_strip_across<T>(const T* const*, int64_t, int, int64_t, int64_t, int64_t, uint32_t*);             \
  template void pack_panel_across<T>(const T* const*, int64_t, int, int64_t, int64_t, int64_t, uint32_t*);             \
  template void pack_tile_in_strip<T>(const float*, int, int64_t, int64_t, uint32_t*);                                 \
  template void pack_tile_in_panel<T>(const float*, int, int64_t, int64_t, uint32_t*);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(BFloat16)

}  // namespace libmoe_fast::narrow
