// Which instructions the tiles may use: known when they are compiled, and of those, what this machine has.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__aarch64__))
#define LIBMOE_FAST_NARROW 1  // AVX2 or NEON: narrow.cpp
#endif
#if defined(__GNUC__) && defined(__x86_64__)
#define LIBMOE_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define LIBMOE_FAST_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define LIBMOE_FAST_VECTORS __attribute__((target("avx2,fma")))
#else
#define LIBMOE_FAST_VECTORS
#endif

// GCC keeps the accumulators in registers only if every loop over them is unrolled.
#ifdef __clang__
#define LIBMOE_FAST_UNROLL _Pragma("unroll")
#else
#define LIBMOE_FAST_UNROLL _Pragma("GCC unroll 16")
#endif

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

#ifdef LIBMOE_FAST_AVX512

inline bool has_avx512() {
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && allowed_isa() != Isa::avx2;
  return supported;
}

inline bool has_narrow() {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
}

inline bool has_avx512_bf16() {
  static const bool supported = has_avx512() && __builtin_cpu_supports("avx512bf16") && allowed_isa() == Isa::all;
  return supported;
}

// Whether torch's mm has a fast way to multiply bf16, on AVX-512 at the least, and fp16, by its own instructions only.
inline bool mm_has_bf16() { return has_avx512(); }
inline bool mm_has_fp16() {
#if defined(__clang__) || __GNUC__ >= 12  // older ones do not know the name
  static const bool supported = has_avx512() && __builtin_cpu_supports("avx512fp16");
  return supported;
#else
  return false;
#endif
}

#else

inline bool has_avx512() { return false; }
inline bool has_avx512_bf16() { return false; }
inline bool mm_has_bf16() { return true; }
inline bool mm_has_fp16() { return true; }
#ifdef LIBMOE_FAST_NARROW
inline bool has_narrow() { return true; }  // NEON is part of every 64-bit ARM
#else
inline bool has_narrow() { return false; }
#endif

#endif

}  // namespace libmoe_fast
