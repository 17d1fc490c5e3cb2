// What the AVX-512 code shares: how its functions are compiled, and loads of the rest of a row.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define LIBMOE_FAST_TILES 1
// GCC 12 takes the undefined operand of its own unmasked intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "sanitizer.h"

#define LIBMOE_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define LIBMOE_FAST_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
// GCC keeps the accumulators in registers only if every loop over them is unrolled.
#define LIBMOE_FAST_UNROLL _Pragma("GCC unroll 16")

namespace libmoe_fast {

// The first elements of a row, as many as the mask has bits, zeros after them.
LIBMOE_FAST_AVX512 inline __m512i load_halves(__mmask32 valid, const void* row) {
  check_read(row, __builtin_popcount(valid) * 2);
  return _mm512_maskz_loadu_epi16(valid, row);
}

LIBMOE_FAST_AVX512 inline __m512 load_floats(__mmask16 valid, const float* row) {
  check_read(row, __builtin_popcount(valid) * 4);
  return _mm512_maskz_loadu_ps(valid, row);
}

}  // namespace libmoe_fast

#endif
