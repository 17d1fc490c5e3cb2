// Operands packed for tile_gemm.h, in the order in which a multiplication reads them: the left one in strips of up to
// strip_rows() rows, the right one in panels of kTileColumns columns.
//
// Either is a sequence of steps; a step holds one 32-bit word for each row of a strip or column of a panel: one fp32 value,
// or two bf16 values that follow each other in the sum. Without AVX-512 bf16 is packed in fp32, too: converted once, for
// all that it meets; and a strip or panel is two pieces (narrow.cpp), each a sequence of all steps.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "instructions.h"
#include "tile_gemm.h"

namespace libmoe_fast {

template <typename T>
constexpr int kPerWord = 4 / sizeof(T);  // values, on AVX-512

template <typename T>
int per_word() {
  return has_avx512() ? kPerWord<T> : 1;
}

// Of one value, packed.
template <typename T>
int64_t packed_bytes() {
  return 4 / per_word<T>();
}

inline int64_t strip_words(int64_t steps) { return steps * strip_rows(); }

// Rows that packing across fetches before it reads them. Rows a page apart are read too haphazardly for the processor to
// foresee. To the second-level cache: rows a power of two apart all share a dozen places of the first.
constexpr int64_t kRowsAhead = 40;

// Fetches row[column]; the row may be null, which is then harmless.
template <typename T>
inline void fetch_early(const T* row, int64_t column) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(column) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const char*>(address), 0, 2);
}

// Packs `count` rows, or columns of the matrix that they are transposed, whose elements follow each other in the sum:
// `elements` of each, zeros up to `steps`, and zeros for those that are missing.
template <typename T>
void pack_strip(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed);
template <typename T>
void pack_panel(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed);

// Packs `columns` columns, from `column` on, of rows that follow each other in the sum: steps * per_word rows, of which a
// null one stands for zeros. Strips or panels come one after the other, the last one filled up with zeros.
template <typename T>
void pack_strips_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, uint32_t* packed);
template <typename T>
void pack_panels_across(const T* const* rows, int64_t column, int64_t columns, int64_t steps, uint32_t* packed);

// The same for a tile [kTileRows, kTileColumns] of results, `rows` rows of it, rounded to T on the way: the steps from
// `step` on, of `steps`, of a strip that sums over its columns, and of a panel that sums over its rows, an even number of
// them.
template <typename T>
void pack_tile_in_strip(const float* tile, int rows, int64_t step, int64_t steps, uint32_t* packed);
template <typename T>
void pack_tile_in_panel(const float* tile, int rows, int64_t step, int64_t steps, uint32_t* packed);

}  // namespace libmoe_fast
