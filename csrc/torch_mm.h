// torch's own matrix product, on plain memory, through the stable ABI's dispatcher call.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace libmoe_fast {

// A row-major [rows, columns] block, or its transpose.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  bool transposed = false;

  Matrix t() const { return {data, rows, columns, !transposed}; }
};

// out, row-major, = left * right
template <typename T>
void torch_mm(T* out, const Matrix<T>& left, const Matrix<T>& right);

}  // namespace libmoe_fast
