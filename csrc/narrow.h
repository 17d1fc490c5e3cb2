// Tiles where there is no AVX-512, on AVX2 or NEON: the same operands (packing.h), multiplied in pieces for which their
// registers suffice.
#pragma once

#include <cstdint>

#include "tile_gemm.h"

namespace libmoe_fast::narrow {

// As the functions of the same names in tile_gemm.h and packing.h. bf16 words are widened as they are multiplied.
template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, Ahead ahead);
template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, Ahead ahead);
template <typename T>
void pack_along(const T* const* rows, int count, int64_t elements, int64_t steps, int width, uint32_t* packed);
template <typename T>
void pack_tile_along(const float* tile, int rows, uint32_t* packed);
template <typename T>
void pack_tile_across(const float* tile, int rows, uint32_t* packed);

// One panel of packing.h's pack_across: `count` columns from `column` on, the rest of the width zero.
template <typename T>
void pack_panel_across(const T* const* rows, int64_t column, int count, int64_t steps, int width, uint32_t* packed);

}  // namespace libmoe_fast::narrow
