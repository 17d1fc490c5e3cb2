// gather, weighted_scatter and row_dot: one warp per row, or per piece of a wide row.
//
// All three are bound by memory: a lane has kUnroll loads of 16 bytes in flight. Rows that are not aligned to 16 bytes
// go element by element (kWidth = 1). Sums are kept in fp32 (fp64 for fp64) and rounded once, to nearest even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "block.cuh"

namespace libmoe_fast::cuda {

constexpr int kUnroll = 2;

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }

__device__ inline void narrow(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& out) { out = __float2half_rn(value); }
__device__ inline void narrow(float value, float& out) { out = value; }
__device__ inline void narrow(double value, double& out) { out = value; }

// Neighbouring elements that one lane loads and stores at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

// A row's place and weight. One outside [0, rows) becomes row 0 with the weight NaN: nothing is read out of bounds, and
// the caller, whom no error can reach without waiting for the device, sees NaN.
template <typename T>
struct WeightedRow {
  int64_t row;
  T weight;

  __device__ WeightedRow(int64_t asked, int64_t rows, const T* weight_of_row)
      : row(0), weight(static_cast<T>(NAN)) {
    if (static_cast<uint64_t>(asked) >= static_cast<uint64_t>(rows)) return;
    row = asked;
    weight = weight_of_row == nullptr ? static_cast<T>(1) : *weight_of_row;
  }
};

__device__ inline int64_t warp_of_grid() { return static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(); }

// out[r] = weight * x[order[r] / top_k]; x, out: [, vectors]; weights [rows] by flat choice, or nullptr.
// blockIdx.y: which kLanes * kUnroll vectors of the row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const Vector<T, kWidth>* __restrict__ x, const int64_t* __restrict__ order,
                const Accumulator<T>* __restrict__ weights, Vector<T, kWidth>* __restrict__ out, int64_t rows,
                int64_t vectors, int64_t top_k) {
  const int64_t r = warp_of_grid();
  if (r >= rows) return;
  const int64_t choice = order[r];
  const bool weighted = weights != nullptr && choice >= 0 && choice < rows;
  const WeightedRow<Accumulator<T>> source(choice, rows, weighted ? weights + choice : nullptr);
  const Vector<T, kWidth>* const from = x + source.row / top_k * vectors;
  Vector<T, kWidth>* const to = out + r * vectors;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * (kLanes * kUnroll) + lane_id();

  Vector<T, kWidth> loaded[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kLanes < vectors) loaded[u] = from[first + u * kLanes];
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kLanes >= vectors) break;
    // Without weights the weight is 1, and a product with it is exact.
#pragma unroll
    for (T& value : loaded[u].values) narrow(source.weight * widen(value), value);
    to[first + u * kLanes] = loaded[u];
  }
}

// out[t] = sum over k, in that order, of weights[t, k] * y[inverse[t, k]]; blockIdx.y as above.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    combine_rows(const Vector<T, kWidth>* __restrict__ y, const int64_t* __restrict__ inverse,
                 const Accumulator<T>* __restrict__ weights, Vector<T, kWidth>* __restrict__ out, int64_t tokens,
                 int64_t vectors, int64_t top_k) {
  const int64_t t = warp_of_grid();
  if (t >= tokens) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * (kLanes * kUnroll) + lane_id();

  Accumulator<T> sum[kUnroll][kWidth];
  for (int64_t choice = t * top_k; choice < (t + 1) * top_k; ++choice) {
    const WeightedRow<Accumulator<T>> source(inverse[choice], tokens * top_k,
                                             weights == nullptr ? nullptr : weights + choice);
    const Vector<T, kWidth>* const from = y + source.row * vectors;
    Vector<T, kWidth> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kLanes < vectors) loaded[u] = from[first + u * kLanes];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kLanes >= vectors) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const Accumulator<T> term = source.weight * widen(loaded[u].values[j]);
        sum[u][j] = choice == t * top_k ? term : sum[u][j] + term;
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kLanes >= vectors) break;
    Vector<T, kWidth> rounded;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) narrow(sum[u][j], rounded.values[j]);
    out[t * vectors + first + u * kLanes] = rounded;
  }
}

// out[t, k] = <a[inverse[t, k]], b[t]>, one warp for each.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    dot_rows(const Vector<T, kWidth>* __restrict__ a, const Vector<T, kWidth>* __restrict__ b,
             const int64_t* __restrict__ inverse, Accumulator<T>* __restrict__ out, int64_t rows, int64_t vectors,
             int64_t top_k) {
  const int64_t choice = warp_of_grid();
  if (choice >= rows) return;
  const WeightedRow<Accumulator<T>> source(inverse[choice], rows, nullptr);
  const Vector<T, kWidth>* const left = a + source.row * vectors;
  const Vector<T, kWidth>* const right = b + choice / top_k * vectors;

  Accumulator<T> sum[kWidth] = {};
#pragma unroll 2
  for (int64_t column = lane_id(); column < vectors; column += kLanes) {
    const Vector<T, kWidth> l = left[column], r = right[column];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] += widen(l.values[j]) * widen(r.values[j]);
  }
#pragma unroll
  for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  const Accumulator<T> total = source.weight * warp_sum(sum[0]);
  if (lane_id() == 0) out[choice] = total;
}

}  // namespace libmoe_fast::cuda
