// What the AVX-512 code shares: loads and rounding to bf16.
#pragma once

#include "instructions.h"

#ifdef LIBMOE_FAST_AVX512
// GCC 12 takes the undefined operand of its own unmasked intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstdint>

#include "dtypes.h"

namespace libmoe_fast {

// 32 values, rounded to bf16. Numbers below the normal range become zeros, as in the instruction that multiplies bf16.
LIBMOE_FAST_AVX512_BF16 inline __m512i round_to_bf16(const float* values) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values)));
}

// Which of 2 x 32 values goes where, to pair value i of one row with value i of the other: i < 16, and the rest.
struct alignas(64) Interleave {
  uint16_t low[32], high[32];

  constexpr Interleave() : low(), high() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      high[i] = static_cast<uint16_t>(low[i] + 16);
    }
  }
};
inline constexpr Interleave kInterleave;

// A step of a right operand that is not packed: 32 columns of one row, or of two, interleaved.
LIBMOE_FAST_AVX512 inline void load_step(const BFloat16* const* rows, int64_t column, __m512i (&step)[2]) {
  const __m512i even = _mm512_loadu_si512(rows[0] + column), odd = _mm512_loadu_si512(rows[1] + column);
  step[0] = _mm512_permutex2var_epi16(even, _mm512_load_si512(kInterleave.low), odd);
  step[1] = _mm512_permutex2var_epi16(even, _mm512_load_si512(kInterleave.high), odd);
}

LIBMOE_FAST_AVX512 inline void load_step(const float* const* rows, int64_t column, __m512i (&step)[2]) {
  step[0] = _mm512_loadu_si512(rows[0] + column);
  step[1] = _mm512_loadu_si512(rows[0] + column + 16);
}

}  // namespace libmoe_fast

#endif
