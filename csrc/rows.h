// Loops over one row. Written for the compiler's vectoriser: no branches, no calls, restrict pointers, and where the
// order of a sum matters it is spelled out, so that every machine and every instruction set gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

// A wheel must run on every x86-64, but the oldest convert from and to 16 bits slowly (bf16 4 times, fp16 14): GCC
// compiles these functions for newer instruction sets too, and the loader picks. Elsewhere one version does.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define LIBMOE_FAST_ROW __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LIBMOE_FAST_ROW inline
#endif

namespace libmoe_fast {

// Sum of kCount values, a power of two: the second half is added to the first, and so on. In vector types, because GCC
// makes a chain of single values, or of loads that wait for narrower stores, out of the loops.
template <int kCount, typename Real>
inline __attribute__((always_inline)) Real sum_in_halves(const Real* values) {
  if constexpr (kCount == 2) {
    return values[0] + values[1];
  } else {
    typedef Real Half __attribute__((vector_size(kCount / 2 * sizeof(Real))));
    Half first, second;
    std::memcpy(&first, values, sizeof first);
    std::memcpy(&second, values + kCount / 2, sizeof second);
    first += second;
    Real sums[kCount / 2];
    std::memcpy(sums, &first, sizeof first);
    return sum_in_halves<kCount / 2>(sums);
  }
}

// out = row, in another type, rounded once
template <typename From, typename To>
LIBMOE_FAST_ROW void convert_row(To* __restrict__ out, const From* __restrict__ row, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<To>(static_cast<Accumulator<From>>(row[i]));
}

// out = weight * row
template <typename T>
LIBMOE_FAST_ROW void scale_row(T* __restrict__ out, const T* __restrict__ row, Accumulator<T> weight, int64_t width) {
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(weight * static_cast<Accumulator<T>>(row[i]));
}

// sum = weight * row
template <typename T>
LIBMOE_FAST_ROW void start_sum(Accumulator<T>* __restrict__ sum, const T* __restrict__ row, Accumulator<T> weight,
                      int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] = weight * static_cast<Accumulator<T>>(row[i]);
}

// sum += weight * row
template <typename T>
LIBMOE_FAST_ROW void add_to_sum(Accumulator<T>* __restrict__ sum, const T* __restrict__ row, Accumulator<T> weight,
                       int64_t width) {
  for (int64_t i = 0; i < width; ++i) sum[i] += weight * static_cast<Accumulator<T>>(row[i]);
}

// <a, b> in 16 interleaved partial sums, added up pairwise: a fixed order whatever the vector width.
template <typename T>
LIBMOE_FAST_ROW Accumulator<T> dot_row(const T* __restrict__ a, const T* __restrict__ b, int64_t width) {
  constexpr int kLanes = 16;
  Accumulator<T> lanes[kLanes] = {};
  const T* const end = a + width / kLanes * kLanes;
  for (; a != end; a += kLanes, b += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      lanes[j] += static_cast<Accumulator<T>>(a[j]) * static_cast<Accumulator<T>>(b[j]);
    }
  }
  for (int64_t j = 0; j < width % kLanes; ++j) {
    lanes[j] += static_cast<Accumulator<T>>(a[j]) * static_cast<Accumulator<T>>(b[j]);
  }
  return sum_in_halves<kLanes>(lanes);
}

}  // namespace libmoe_fast
