// What the AVX-512 code shares: how its functions are compiled, where they may run, and rounding to bf16.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define LIBMOE_FAST_TILES 1
// GCC 12 takes the undefined operand of its own unmasked intrinsics for a mistake (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "dtypes.h"

#define LIBMOE_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define LIBMOE_FAST_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
// GCC keeps the accumulators in registers only if every loop over them is unrolled.
#define LIBMOE_FAST_UNROLL _Pragma("GCC unroll 16")

namespace libmoe_fast {

// LIBMOE_FAST_CPU_ISA takes instructions away that this machine has: so that one machine can test every path.
enum class Isa { avx2, avx512, all };

inline Isa allowed_isa() {
  const char* choice = std::getenv("LIBMOE_FAST_CPU_ISA");
  const std::string isa = choice == nullptr ? "" : choice;
  if (isa == "avx2") return Isa::avx2;
  if (isa == "avx512") return Isa::avx512;
  if (isa.empty()) return Isa::all;
  throw std::runtime_error("libmoe_fast: LIBMOE_FAST_CPU_ISA is '" + isa +
                           "'; expected avx2, avx512 (without its bf16), or nothing, for all that this machine has");
}

inline bool has_avx512() {
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && allowed_isa() != Isa::avx2;
  return supported;
}

inline bool has_avx2() {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
}

inline bool has_avx512_bf16() {
  static const bool supported = has_avx512() && __builtin_cpu_supports("avx512bf16") && allowed_isa() == Isa::all;
  return supported;
}

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
