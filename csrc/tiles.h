// What happens to a tile of a GEMM's result while it is in cache: bias, activation, rounding, and their gradients.
//
// A tile is [kTileRows, kTileColumns] in the accumulator's type, of which `rows` x `columns` are part of the matrix and
// the rest is zero. Written for the vectoriser: the inner loops have a fixed length.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activations.h"
#include "rows.h"
#include "tile_gemm.h"

namespace libmoe_fast {

constexpr int kTileSize = kTileRows * kTileColumns;

// tile = matrix [rows, columns], zeros around it
template <typename T>
LIBMOE_FAST_ROW void load_tile(Accumulator<T>* __restrict__ tile, const T* __restrict__ matrix, int64_t stride,
                               int rows, int columns) {
  for (int i = 0; i < rows; ++i) {
    Accumulator<T>* row = tile + i * kTileColumns;
    if (columns == kTileColumns) {
      for (int j = 0; j < kTileColumns; ++j) row[j] = static_cast<Accumulator<T>>(matrix[i * stride + j]);
    } else {
      for (int j = 0; j < columns; ++j) row[j] = static_cast<Accumulator<T>>(matrix[i * stride + j]);
      for (int j = columns; j < kTileColumns; ++j) row[j] = 0;
    }
  }
}

// Whether this machine has an instruction that rounds to bf16.
bool rounds_in_hardware();
// store_tile with that instruction: twelve cycles less per row, which counts after a short sum.
void store_rounded(BFloat16* matrix, int64_t stride, const float* tile, int rows, int columns);

template <typename T>
LIBMOE_FAST_ROW void store_any_tile(T* __restrict__ matrix, int64_t stride, const Accumulator<T>* __restrict__ tile,
                                    int rows, int columns) {
  for (int i = 0; i < rows; ++i) {
    const Accumulator<T>* row = tile + i * kTileColumns;
    if (columns == kTileColumns) {
      for (int j = 0; j < kTileColumns; ++j) matrix[i * stride + j] = static_cast<T>(row[j]);
    } else {
      for (int j = 0; j < columns; ++j) matrix[i * stride + j] = static_cast<T>(row[j]);
    }
  }
}

// matrix = tile, rounded
template <typename T>
void store_tile(T* matrix, int64_t stride, const Accumulator<T>* tile, int rows, int columns) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (rounds_in_hardware()) return store_rounded(matrix, stride, tile, rows, columns);
  }
  store_any_tile<T>(matrix, stride, tile, rows, columns);
}

// The same past the caches, for what is larger than they are: a line that is written as a whole need not be read first.
// finish_streams comes before another thread may read it.
template <typename T>
void stream_tile(T* matrix, int64_t stride, const float* tile, int rows, int columns);
void finish_streams();

// tile += bias, rounded to T: what backward will read is what the activation sees.
template <typename T>
LIBMOE_FAST_ROW void add_bias(Accumulator<T>* __restrict__ tile, const T* __restrict__ bias, int rows, int columns) {
  Accumulator<T> wide[kTileColumns] = {};
  if (bias != nullptr) {
    for (int j = 0; j < columns; ++j) wide[j] = static_cast<Accumulator<T>>(bias[j]);
  }
  for (int i = 0; i < rows; ++i) {
    Accumulator<T>* row = tile + i * kTileColumns;
    for (int j = 0; j < kTileColumns; ++j) {
      row[j] = static_cast<Accumulator<T>>(static_cast<T>(row[j] + wide[j]));
    }
  }
}

// tile += matrix
inline void add_tile(float* __restrict__ tile, const float* __restrict__ matrix, int64_t stride, int rows, int columns) {
  for (int i = 0; i < rows; ++i) add_to_sum<float>(tile + i * kTileColumns, matrix + i * stride, 1, columns);
}

// What act(gate) multiplies, and how it rises with up.
template <bool gpt_oss, typename Real>
inline __attribute__((always_inline)) Real gated_factor(Real up, Real& slope) {
  slope = Real(1);
  if constexpr (!gpt_oss) return up;
  const Real cut = up > kGptOssLimit<Real> ? kGptOssLimit<Real> : up < -kGptOssLimit<Real> ? -kGptOssLimit<Real> : up;
  slope = cut == up ? Real(1) : Real(0);
  return Real(1) + cut;
}

// gate *= what it multiplies
template <bool gpt_oss, typename Real>
LIBMOE_FAST_ROW void apply_gate(Real* __restrict__ gate, const Real* __restrict__ up, int rows) {
  Real slope;
  for (int i = 0; i < rows * kTileColumns; ++i) gate[i] *= gated_factor<gpt_oss>(up[i], slope);
}

// The plain MLP's gradients from g = W2^T dy, the recomputed value = act(z) and slope = act'(z):
// dots[i] = <g_i, value_i>, value = weight * value, g = dz = weight * g * slope, sums[j] += sum over i of dz[i, j].
template <typename Real>
LIBMOE_FAST_ROW void activation_gradients(Real* __restrict__ g, Real* __restrict__ value,
                                          const Real* __restrict__ slope, const Real* __restrict__ weight,
                                          Real* __restrict__ dots, Real* __restrict__ sums, int rows) {
  Real tile_sums[kTileColumns] = {};  // sums of sums lose less
  for (int i = 0; i < rows; ++i) {
    const int64_t row = i * kTileColumns;
    Real products[kTileColumns];
    for (int j = 0; j < kTileColumns; ++j) {
      products[j] = g[row + j] * value[row + j];
      const Real dz = weight[i] * g[row + j] * slope[row + j];
      value[row + j] *= weight[i];
      g[row + j] = dz;
      tile_sums[j] += dz;
    }
    dots[i] = sum_in_halves<kTileColumns>(products);
  }
  for (int j = 0; j < kTileColumns; ++j) sums[j] += tile_sums[j];
}

// The same for a gated MLP, a = act(gate) * up, or what gpt_oss has there: value becomes weight * a, g the gradient by gate, up that by up.
template <bool gpt_oss, typename Real>
LIBMOE_FAST_ROW void gated_gradients(Real* __restrict__ g, Real* __restrict__ up, Real* __restrict__ value,
                                     const Real* __restrict__ slope, const Real* __restrict__ weight,
                                     Real* __restrict__ dots, Real* __restrict__ gate_sums,
                                     Real* __restrict__ up_sums, int rows) {
  Real gate_tile_sums[kTileColumns] = {}, up_tile_sums[kTileColumns] = {};
  for (int i = 0; i < rows; ++i) {
    const int64_t row = i * kTileColumns;
    Real products[kTileColumns];
    for (int j = 0; j < kTileColumns; ++j) {
      Real up_slope;
      const Real factor = gated_factor<gpt_oss>(up[row + j], up_slope);
      const Real a = value[row + j] * factor;
      products[j] = g[row + j] * a;
      const Real scaled = weight[i] * g[row + j];
      const Real dgate = scaled * factor * slope[row + j];
      const Real dup = scaled * value[row + j] * up_slope;
      value[row + j] = weight[i] * a;
      g[row + j] = dgate;
      up[row + j] = dup;
      gate_tile_sums[j] += dgate;
      up_tile_sums[j] += dup;
    }
    dots[i] = sum_in_halves<kTileColumns>(products);
  }
  for (int j = 0; j < kTileColumns; ++j) {
    gate_sums[j] += gate_tile_sums[j];
    up_sums[j] += up_tile_sums[j];
  }
}

}  // namespace libmoe_fast
