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

constexpr int kColumns = 16;           // that are multiplied at a time, by up to kMostRows rows
constexpr int64_t kStepsPerSum = 512;  // sums of sums lose less than one long sum; shorter ones begin too often

// row [kColumns] = sum, or row += sum
LIBMOE_FAST_VECTORS inline void store_sum(float* row, Floats sum, bool add_to_it) {
  store_floats(row, add_to_it ? add(load_floats(row), sum) : sum);
}

template <int kRows>
LIBMOE_FAST_VECTORS void multiply(int64_t steps, const float* left, const float* right, float* tile, bool add) {
  Floats sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = zeros();
  for (; steps > 0; --steps, left += kNarrowRows, right += kTileColumns) {
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

// A part of the steps, some columns after the other.
void multiply_part(int rows, int64_t steps, const float* left, const float* right, float* tile, bool add,
                   const Ahead& ahead) {
  const int64_t pieces = divide_up(rows, kMostRows);
  Fetch fetch(ahead, steps, pieces * kTileColumns / kColumns);
  for (int column = 0; column < kTileColumns; column += kColumns) {
    int64_t pieces_left = pieces;
    for (int row = 0, count; row < rows; row += count) {
      count = static_cast<int>(divide_up(rows - row, pieces_left--));
      fetch.next();
      kMultiply[count - 1](steps, left + row, right + column, tile + row * kTileColumns + column, add);
    }
  }
}

// Calls multiply_part for all steps, and before each prepare(steps before it, steps of it).
template <typename Prepare>
void multiply_in_parts(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile,
                       const Ahead& ahead, const Prepare& prepare) {
  const auto *lefts = reinterpret_cast<const float*>(left), *rights = reinterpret_cast<const float*>(right);
  for (int64_t done = 0; done < steps; done += kStepsPerSum) {
    const int64_t part = std::min(kStepsPerSum, steps - done);
    prepare(done, part);
    multiply_part(rows, part, lefts + done * kNarrowRows, rights + done * kTileColumns, tile, done > 0,
                  ahead.after(done));
  }
}

// 8 x 8 values: row i becomes a step's values from `first` on. At the end of a strip there is room for four.
template <int kWidth>
LIBMOE_FAST_VECTORS inline void store_transposed(Words (&block)[8], int first, float* packed) {
  static_assert(kWidth % 8 == 0 || kWidth % 8 == 4);
  transpose(block);
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 8; ++i) {
    float* values = packed + i * kWidth + first;
    kWidth - first >= 8 ? store_floats(values, as_floats(block[i])) : store_four(values, as_floats(block[i]));
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

template <int kWidth, typename T>
void pack_rows(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
  for (int64_t step = 0; step < steps; step += kBlockSteps) {
    for (int first = 0; first < kWidth; first += 8) {
      pack_8_rows<kWidth>(rows + first, std::clamp(count - first, 0, 8), elements, step,
                          std::min(steps, step + kBlockSteps), first, reinterpret_cast<float*>(packed));
    }
  }
}

template <int kWidth, typename T>
LIBMOE_FAST_VECTORS void pack_columns(const T* const* rows, int64_t column, int count, int64_t steps,
                                      int64_t steps_left, uint32_t* packed) {
  auto* values = reinterpret_cast<float*>(packed);
  for (int64_t step = 0; step < steps; ++step, values += kWidth) {
    if (step + kRowsAhead < steps_left) fetch_early(rows[step + kRowsAhead], column);
    const int there = rows[step] == nullptr ? 0 : count;
    if (there == kWidth) {
      for (int j = 0; j < kWidth; ++j) values[j] = static_cast<float>(rows[step][column + j]);
    } else {
      for (int j = 0; j < kWidth; ++j) values[j] = j < there ? static_cast<float>(rows[step][column + j]) : 0.0f;
    }
  }
}

// Eight values of a result, rounded to T.
template <typename T>
LIBMOE_FAST_VECTORS inline Words load_rounded(const float* values) {
  const Words words = load_values(values);
  return std::is_same_v<T, float> ? words : round_to_bf16(words);
}

}  // namespace

void multiply_tile(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, Ahead ahead) {
  multiply_in_parts(rows, steps, left, right, tile, ahead, [](int64_t, int64_t) {});
}

template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, Ahead ahead) {
  multiply_in_parts(rows, steps, left, packed, tile, ahead, [=](int64_t done, int64_t part) {
    pack_columns<kTileColumns>(right + done, column, kTileColumns, part, steps - done, packed + done * kTileColumns);
  });
}

template <typename T>
void pack_strip(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
  pack_rows<kNarrowRows>(rows, count, elements, steps, packed);
}

template <typename T>
void pack_panel(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed) {
  pack_rows<kTileColumns>(rows, count, elements, steps, packed);
}

template <typename T>
void pack_strip_across(const T* const* rows, int64_t column, int count, int64_t steps, int64_t steps_left,
                       uint32_t* packed) {
  pack_columns<kNarrowRows>(rows, column, count, steps, steps_left, packed);
}

template <typename T>
void pack_panel_across(const T* const* rows, int64_t column, int count, int64_t steps, int64_t steps_left,
                       uint32_t* packed) {
  pack_columns<kTileColumns>(rows, column, count, steps, steps_left, packed);
}

template <typename T>
LIBMOE_FAST_VECTORS void pack_tile_in_strip(const float* tile, int rows, uint32_t* packed) {
  for (int column = 0; column < kTileColumns; column += 8) {
    for (int first = 0; first < kNarrowRows; first += 8) {
      Words block[8];
      LIBMOE_FAST_UNROLL
      for (int i = 0; i < 8; ++i) {
        block[i] = first + i < rows ? load_rounded<T>(tile + (first + i) * kTileColumns + column) : no_words();
      }
      store_transposed<kNarrowRows>(block, first, reinterpret_cast<float*>(packed) + column * kNarrowRows);
    }
  }
}

template <typename T>
LIBMOE_FAST_VECTORS void pack_tile_in_panel(const float* tile, int rows, uint32_t* packed) {
  const int values = rows * kTileColumns, even = (rows + rows % 2) * kTileColumns;
  for (int i = 0; i < even; i += 8) store_words(packed + i, i < values ? load_rounded<T>(tile + i) : no_words());
}

#else  // Never called: tiles_pay says no.

namespace {

[[noreturn]] void not_here() { throw std::logic_error("libmoe_fast: tiles are not used on this machine"); }

}  // namespace

void multiply_tile(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead) { not_here(); }

template <typename T>
void multiply_tile_packing(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*, Ahead) {
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
void pack_strip_across(const T* const*, int64_t, int, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_panel_across(const T* const*, int64_t, int, int64_t, int64_t, uint32_t*) {
  not_here();
}

template <typename T>
void pack_tile_in_strip(const float*, int, uint32_t*) {
  not_here();
}

template <typename T>
void pack_tile_in_panel(const float*, int, uint32_t*) {
  not_here();
}

#endif

#define LIBMOE_FAST_INSTANTIATE(T)                                                                                     \
  template void multiply_tile_packing<T>(int, int64_t, const uint32_t*, const T* const*, int64_t, uint32_t*, float*,   \
                                         Ahead);                                                                       \
  template void pack_strip<T>(const T* const*, int, int64_t, int64_t, uint32_t*);                                      \
  template void pack_panel<T>(const T* const*, int, int64_t, int64_t, uint32_t*);                                      \
  template void pack_strip_across<T>(const T* const*, int64_t, int, int64_t, int64_t, uint32_t*);                      \
  template void pack_panel_across<T>(const T* const*, int64_t, int, int64_t, int64_t, uint32_t*);                      \
  template void pack_tile_in_strip<T>(const float*, int, uint32_t*);                                                   \
  template void pack_tile_in_panel<T>(const float*, int, uint32_t*);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(BFloat16)

}  // namespace libmoe_fast::narrow
