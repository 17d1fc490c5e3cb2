// Element types of the row kernels, and the step from a run-time dtype to a compile-time one.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace libmoe_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Sums are kept in fp32 for the 16- and 32-bit types and in fp64 for fp64; one rounding, to nearest even, at the end.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline size_t element_size(ScalarType dtype) {
  if (dtype == ScalarType::Long || dtype == ScalarType::Double) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

inline bool is_row_dtype(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float ||
         dtype == ScalarType::Double;
}

// The name a Python user knows; the four row types and int64 are the ones messages mostly need.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return torch::headeronly::toString(dtype);
  }
}

// Calls body.operator()<T>() with the C++ type of `dtype`, which the caller has checked with is_row_dtype.
template <typename Body>
void dispatch_row_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    case ScalarType::Half: return body.template operator()<Half>();
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::Double: return body.template operator()<double>();
    default: throw std::logic_error("libmoe_fast: unchecked dtype " + dtype_name(dtype));
  }
}

}  // namespace libmoe_fast
