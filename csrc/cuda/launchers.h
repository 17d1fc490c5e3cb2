// The CUDA kernels as plain functions on device pointers: no torch and no CUDA header on either side, so that the .cu
// files compile in seconds and the host part (ops.cpp) with any C++ compiler.
//
// All of them only enqueue work on `stream` (a cudaStream_t): nothing waits for the device, so they can be captured in
// a CUDA graph. They return nullptr, or what went wrong. Sizes are 64-bit; empty inputs are fine.
#pragma once

#include <cstdint>

namespace libmoe_fast::cuda {

enum class Dtype { kBFloat16, kFloat16, kFloat32, kFloat64 };

// A block keeps a counter per expert and warp in 48 KiB of shared memory.
constexpr int64_t kMaxExperts = 1024;

// int64 entries of scratch memory that permute_index needs.
int64_t permute_index_scratch(int64_t choices, int64_t num_experts);

// index [choices] -> order, inverse [choices], offsets [num_experts + 1], as in ../ops.h. A choice outside
// [0, num_experts) is sorted behind all experts and belongs to none: offsets[num_experts] then is below `choices`.
const char* permute_index(const int64_t* index, int64_t choices, int64_t num_experts, int64_t* scratch, int64_t* order,
                          int64_t* inverse, int64_t* offsets, void* stream);

// The row kernels. weights may be nullptr; weights and row_dot's out are fp32, or fp64 for fp64 rows. An entry of order
// or inverse outside its range reads nothing and makes its results NaN.

// x [rows / top_k, width], order [rows] -> out [rows, width]
const char* gather(Dtype dtype, const void* x, const int64_t* order, const void* weights, void* out, int64_t rows,
                   int64_t width, int64_t top_k, void* stream);

// y [tokens * top_k, width], inverse [tokens * top_k] -> out [tokens, width]
const char* weighted_scatter(Dtype dtype, const void* y, const int64_t* inverse, const void* weights, void* out,
                             int64_t tokens, int64_t width, int64_t top_k, void* stream);

// a [tokens * top_k, width], b [tokens, width], inverse [tokens * top_k] -> out [tokens, top_k]
const char* row_dot(Dtype dtype, const void* a, const void* b, const int64_t* inverse, void* out, int64_t tokens,
                    int64_t width, int64_t top_k, void* stream);

}  // namespace libmoe_fast::cuda
