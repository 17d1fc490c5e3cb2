// What all kernels share: the shape of a block, sums over a warp, and the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// Size given at the launch. Declared once, for all kernels.
extern __shared__ unsigned char libmoe_fast_shared[];

namespace libmoe_fast::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kLanes; }

// Sum over this lane and the lanes before it.
__device__ inline int64_t warp_prefix_sum(int64_t value) {
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_id() >= distance) value += before;
  }
  return value;
}

// Sum over all lanes, in a fixed order; every lane gets it.
template <typename T>
__device__ T warp_sum(T value) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Enqueues `blocks` blocks of kThreads threads. nullptr, or what went wrong.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 blocks, int64_t shared_bytes, void* stream,
                   Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace libmoe_fast::cuda
