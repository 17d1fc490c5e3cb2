// Operands packed for tile_gemm.h, in the order in which a multiplication reads them.
//
// A packed operand is a sequence of steps; a step holds one 32-bit word for each of its `width` rows (14, left operand)
// or columns (32, right operand). A word is one fp32 value, or two bf16 values that follow each other in the sum.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "tile_gemm.h"

namespace libmoe_fast {

template <typename T>
constexpr int kPerWord = 4 / sizeof(T);

// Rows that packing across fetches before it reads them. Rows a page apart are read too haphazardly for the processor to
// foresee. To the second-level cache: rows a power of two apart all share a dozen places of the first.
constexpr int64_t kRowsAhead = 40;

// Packs `count` rows whose elements follow each other in the sum: `elements` of each, zeros up to `steps`, and zeros for
// the rest of the width.
template <typename T>
void pack_along(const T* const* rows, int count, int64_t elements, int64_t steps, int width, uint32_t* packed);

// Packs `columns` columns, from `column` on, of rows that follow each other in the sum: steps * kPerWord rows, of which a
// null one stands for zeros. Panels of `width` columns come one after the other, the last one filled up with zeros.
template <typename T>
void pack_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, int width, uint32_t* packed);

// The same for a tile [kTileRows, kTileColumns] of results, `rows` rows of it, rounded to T on the way: to a left operand
// that sums over its columns, and to a right operand that sums over its rows, an even number of them.
template <typename T>
void pack_tile_along(const float* tile, int rows, uint32_t* packed);
template <typename T>
void pack_tile_across(const float* tile, int rows, uint32_t* packed);

}  // namespace libmoe_fast
