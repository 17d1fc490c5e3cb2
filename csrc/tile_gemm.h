// Matrix products in tiles of 14 x 32, accumulated in registers, with operands packed in the order they are read.
//
// torch's mm packs the weights again on every call and leaves no way to work on a result before it goes to memory. Here
// an operand is packed once, often by the step that made it, and each finished tile is handed over while it is in cache.
//
// How operands are packed is in packing.h.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "instructions.h"

namespace libmoe_fast {

constexpr int kTileRows = 14, kTileColumns = 32;  // 28 accumulators, 2 right words, 1 left word: 31 of 32 registers

// Rows of a strip, which is a left operand of one tile, on this machine: kTileRows, or kNarrowRows where 16 registers hold
// 6 rows at a time (narrow.cpp).
constexpr int kNarrowRows = 12;
inline int strip_rows() { return has_avx512() ? kTileRows : kNarrowRows; }

constexpr int64_t kCacheLine = 64;

// Whether this machine multiplies tiles of fp32 or bf16 faster than torch's own mm does.
bool tiles_pay(ScalarType dtype);

// Memory that will be read soon, fetched a little at every step of a multiplication, which leaves memory idle. Of `calls`
// multiplications that are given the same memory this is number `call`: where a step has no instruction to spare, each
// fetches its share.
struct Ahead {
  const char* data = nullptr;
  int64_t bytes_per_step = 0, call = 0, calls = 1;

  Ahead after(int64_t steps) const { return {data + steps * bytes_per_step, bytes_per_step, call, calls}; }
};

// A packed panel of `steps` steps, of which a multiplication reads some, from `first` on.
struct Panel {
  const uint32_t* words;
  int64_t steps, first = 0;
};

// tile [kTileRows, kTileColumns] = left * right, a strip of `steps` steps by as many of a panel (packing.h); only the first
// `rows` rows, rounded up to even, are computed.
template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const Panel& right, float* tile,
                   const Ahead& ahead = {});

// The same with a panel that is not packed yet: the kTileColumns columns from `column` on of steps * per_word rows. Leaves
// it packed, as pack_panels_across would, but reads while it multiplies.
template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, const Ahead& ahead = {});

}  // namespace libmoe_fast
