// Tiles where there is no AVX-512, on AVX2 or NEON: the same operands (packing.h), multiplied in pieces for which their
// registers suffice.
#pragma once

#include <cstdint>

#include "tile_gemm.h"

namespace libmoe_fast::narrow {

// As the functions of the same names in tile_gemm.h and packing.h. All that is packed is fp32.
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const Panel& right, float* tile, const Ahead& ahead);
template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, const Ahead& ahead);
template <typename T>
void pack_strip(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed);
template <typename T>
void pack_panel(const T* const* rows, int count, int64_t elements, int64_t steps, uint32_t* packed);
template <typename T>
LIBMOE_FAST_VECTORS void pack_tile_in_strip(const float* tile, int rows, int64_t step, int64_t steps, uint32_t* packed);
template <typename T>
LIBMOE_FAST_VECTORS void pack_tile_in_panel(const float* tile, int rows, int64_t step, int64_t steps, uint32_t* packed);

// Steps [step, end) of one strip or panel of pack_strips_across and pack_panels_across: `count` columns from `column` on,
// the rest zero.
template <typename T>
LIBMOE_FAST_VECTORS void pack_strip_across(const T* const* rows, int64_t column, int count, int64_t step, int64_t end,
                                           int64_t steps, uint32_t* packed);
template <typename T>
LIBMOE_FAST_VECTORS void pack_panel_across(const T* const* rows, int64_t column, int count, int64_t step, int64_t end,
                                           int64_t steps, uint32_t* packed);

}  // namespace libmoe_fast::narrow
