// Matrix products in tiles of 14 x 32, accumulated in registers, with operands packed in the order they are read.
//
// torch's mm packs the weights again on every call and leaves no way to work on a result before it goes to memory. Here
// an operand is packed once, often by the step that made it, and each finished tile is handed over while it is in cache.
//
// A packed operand is a sequence of steps; a step holds one 32-bit word for each of its `width` rows (14, left operand)
// or columns (32, right operand). A word is one fp32 value, or two bf16 values that follow each other in the sum.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace libmoe_fast {

constexpr int kTileRows = 14, kTileColumns = 32;  // 28 accumulators, 2 right words, 1 left word: 31 of 32 registers

template <typename T>
constexpr int kPerWord = 4 / sizeof(T);

// Whether this machine multiplies tiles of this dtype faster than torch's own mm.
bool tiles_pay(ScalarType dtype);

// Memory that will be read soon, fetched a little at every step of a multiplication, which leaves memory idle.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes_per_step = 0;
};

// tile [kTileRows, kTileColumns] = left * right; only the first `rows` rows, rounded up to even, are computed.
template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, Ahead ahead = {});

// Packs `count` rows whose elements follow each other in the sum: `elements` of each, zeros up to `steps`, and zeros for
// the rest of the width.
template <typename T>
void pack_along(const T* const* rows, int count, int64_t elements, int64_t steps, int width, uint32_t* packed);

// Packs `columns` columns, from `column` on, of rows that follow each other in the sum: steps * kPerWord rows, of which a
// null one stands for zeros. Panels of `width` columns come one after the other, the last one filled up with zeros.
template <typename T>
void pack_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, int width, uint32_t* packed);

}  // namespace libmoe_fast
