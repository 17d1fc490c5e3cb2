// Products of a few rows with a few others, for routing: x W^T, A W and A^T x, where one side has only N rows.
//
// Written with the compiler's vector types, so that sums stay in registers on every instruction set, and added up in one
// fixed order: the same bits on every machine and for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "instructions.h"
#include "rows.h"

namespace libmoe_fast {

template <typename Real>
constexpr int kLanes = 64 / sizeof(Real);

template <typename Real>
constexpr int64_t padded_width(int64_t width) {
  return (width + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

// out [padded width] = row, in Real, zeros behind it
template <typename T>
void widen_row(const T* row, int64_t width, Accumulator<T>* out) {
  convert_row(out, row, width);
  std::fill(out + width, out + padded_width<Accumulator<T>>(width), Accumulator<T>(0));
}

// A copy of matrices [rows, width], one below the other, rows padded with zeros.
template <typename Real>
class PaddedRows {
 public:
  explicit PaddedRows(int64_t width) : width_(width), padded_(padded_width<Real>(width)) {}

  void append(const Real* matrix, int64_t rows) {
    const size_t before = values_.size();
    values_.resize(before + rows * padded_);
    for (int64_t i = 0; i < rows; ++i) std::copy_n(matrix + i * width_, width_, values_.data() + before + i * padded_);
  }
  const Real* row(int64_t i) const { return values_.data() + i * padded_; }
  int64_t rows() const { return static_cast<int64_t>(values_.size()) / padded_; }
  int64_t padded() const { return padded_; }

 private:
  int64_t width_, padded_;
  std::vector<Real> values_;
};

constexpr int kDotRows = 8, kDotColumns = 2;

// out[i][j] = <rows[i], columns[j]>; width a multiple of kLanes, whose sums are in vectors of kBytes: larger ones than a
// register GCC takes apart value by value.
template <typename Real, int kRows, int kBytes>
LIBMOE_FAST_ROW void dot_tile(const Real* const* rows, const Real* const* columns, int64_t width, Real* out) {
  typedef Real Vector __attribute__((vector_size(kBytes), aligned(8), may_alias));
  constexpr int kVectors = 64 / kBytes, kInVector = kBytes / sizeof(Real);
  Vector sums[kRows][kDotColumns][kVectors] = {};
  for (int64_t d = 0; d < width; d += kLanes<Real>) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Vector first = *reinterpret_cast<const Vector*>(columns[0] + d + v * kInVector);
      const Vector second = *reinterpret_cast<const Vector*>(columns[1] + d + v * kInVector);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vector row = *reinterpret_cast<const Vector*>(rows[i] + d + v * kInVector);
        sums[i][0][v] += row * first;
        sums[i][1][v] += row * second;
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kDotColumns; ++j) {
      Real lanes[kLanes<Real>];
      std::memcpy(lanes, &sums[i][j], sizeof lanes);
      out[i * kDotColumns + j] = sum_in_halves<kLanes<Real>>(lanes);
    }
  }
}

// kInRegisters rows' sums stay in registers, and kInCache rows in the first-level cache while all columns go by.
template <typename Real, int kInRegisters, int kInCache, int kBytes>
void dot_tiles(const Real* const* rows, int count, const PaddedRows<Real>& matrix, Real* out, int64_t stride) {
  for (int begin = 0; begin < count; begin += kInCache) {
    for (int64_t j = 0; j < matrix.rows(); j += kDotColumns) {
      const Real* right[kDotColumns] = {matrix.row(j), matrix.row(std::min(j + 1, matrix.rows() - 1))};
      for (int first = begin; first < std::min(count, begin + kInCache); first += kInRegisters) {
        const Real* left[kInRegisters];
        for (int i = 0; i < kInRegisters; ++i) left[i] = rows[std::min(first + i, count - 1)];
        Real tile[kInRegisters * kDotColumns];
        dot_tile<Real, kInRegisters, kBytes>(left, right, matrix.padded(), tile);
        for (int i = 0; i < std::min(kInRegisters, count - first); ++i) {
          for (int64_t l = 0; l < kDotColumns && j + l < matrix.rows(); ++l) {
            out[(first + i) * stride + j + l] = tile[i * kDotColumns + l];
          }
        }
      }
    }
  }
}

// out [count, stride] = rows * matrix^T for up to kDotRows padded rows.
template <typename Real>
void dot_rows_with(const Real* const* rows, int count, const PaddedRows<Real>& matrix, Real* out, int64_t stride) {
#ifdef __x86_64__
  constexpr int kBytes = 32;
#else
  constexpr int kBytes = 16;
#endif
  if (has_avx512()) {
    dot_tiles<Real, kDotRows, kDotRows, 64>(rows, count, matrix, out, stride);  // 16 sums and 3 operands in 32 registers
  } else {
    dot_tiles<Real, 2, 4, kBytes>(rows, count, matrix, out, stride);  // 8 and 3 in 16, or twice as many of half the size
  }
}

// sum += a[0] row0 + a[1] row1 + a[2] row2 + a[3] row3
template <typename Real>
LIBMOE_FAST_ROW void add_four_rows(Real* __restrict__ sum, const Real* a, const Real* __restrict__ row0,
                                   const Real* __restrict__ row1, const Real* __restrict__ row2,
                                   const Real* __restrict__ row3, int64_t width) {
  const Real a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
  for (int64_t i = 0; i < width; ++i) sum[i] += (a0 * row0[i] + a1 * row1[i]) + (a2 * row2[i] + a3 * row3[i]);
}

// sum [width] += sum over i < count of factors[i * step] * (rows + i * stride), four rows at a time.
template <typename Real>
void add_rows(Real* sum, const Real* factors, int64_t step, const Real* rows, int64_t stride, int64_t count,
              int64_t width) {
  for (int64_t i = 0; i < count; i += 4) {
    Real a[4];
    const Real* row[4];
    for (int64_t l = 0; l < 4; ++l) {
      const bool there = i + l < count;
      a[l] = there ? factors[(i + l) * step] : Real(0);
      row[l] = rows + (there ? i + l : i) * stride;
    }
    add_four_rows<Real>(sum, a, row[0], row[1], row[2], row[3], width);
  }
}

}  // namespace libmoe_fast
