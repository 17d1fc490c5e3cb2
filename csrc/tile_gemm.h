// Matrix products in tiles of 14 x 32, accumulated in registers, with operands packed in the order they are read.
//
// torch's mm packs the weights again on every call and leaves no way to work on a result before it goes to memory. Here
// an operand is packed once, often by the step that made it, and each finished tile is handed over while it is in cache.
//
// How operands are packed is in packing.h.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace libmoe_fast {

constexpr int kTileRows = 14, kTileColumns = 32;  // 28 accumulators, 2 right words, 1 left word: 31 of 32 registers

// Rows of a tile that this machine multiplies best: 14, or 12 where 16 registers hold 6 rows at a time (narrow.cpp).
int best_tile_rows();

constexpr int64_t kCacheLine = 64;

// Whether this machine multiplies tiles of fp32 or bf16 faster than torch's own mm does, for so many choices of experts.
bool tiles_pay(ScalarType dtype, int64_t choices, int64_t experts);

// Memory that will be read soon, fetched a little at every step of a multiplication, which leaves memory idle.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes_per_step = 0;
};

// tile [kTileRows, kTileColumns] = left * right; only the first `rows` rows, rounded up to even, are computed.
template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, Ahead ahead = {});

// The same with a right operand that is not packed yet: the kTileColumns columns from `column` on of steps * kPerWord
// rows. Leaves it packed, as pack_across would, but reads while it multiplies.
template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, Ahead ahead = {});

}  // namespace libmoe_fast
