// Eight 32-bit words at a time, as one register of AVX2 or two of NEON: what narrow.cpp is written in.
#pragma once

#include "instructions.h"

#ifdef LIBMOE_FAST_NARROW

#include <cstdint>
#include <utility>

#include "dtypes.h"

#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace libmoe_fast::narrow {

// Rows that are multiplied at a time. AVX2 has 16 registers, for 12 sums, 2 right operands and 1 left; NEON 32 of half the
// size, for 24, 4 and 2.
constexpr int kMostRows = 6;

#ifdef __x86_64__

using Words = __m256i;
using Floats = __m256;

// Eight values, in fp32.
LIBMOE_FAST_VECTORS inline Words load_values(const float* values) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}
LIBMOE_FAST_VECTORS inline Words load_values(const BFloat16* values) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
LIBMOE_FAST_VECTORS inline Words no_words() { return _mm256_setzero_si256(); }
LIBMOE_FAST_VECTORS inline Floats as_floats(Words words) { return _mm256_castsi256_ps(words); }

LIBMOE_FAST_VECTORS inline Floats zeros() { return _mm256_setzero_ps(); }
LIBMOE_FAST_VECTORS inline Floats load_floats(const float* values) { return _mm256_loadu_ps(values); }
LIBMOE_FAST_VECTORS inline void store_floats(float* values, Floats floats) { _mm256_storeu_ps(values, floats); }
LIBMOE_FAST_VECTORS inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }

// sum += left (x) right, for kRows values of left
template <int kRows>
LIBMOE_FAST_VECTORS inline void add_products(Floats (&sum)[kRows][2], const float* left, Floats right0, Floats right1) {
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const Floats value = _mm256_broadcast_ss(left + i);
    sum[i][0] = _mm256_fmadd_ps(value, right0, sum[i][0]);
    sum[i][1] = _mm256_fmadd_ps(value, right1, sum[i][1]);
  }
}

LIBMOE_FAST_VECTORS inline void store_words(uint32_t* packed, Words words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), words);
}
LIBMOE_FAST_VECTORS inline void store_six(float* values, Floats floats) {
  _mm_storeu_ps(values, _mm256_castps256_ps128(floats));
  _mm_storel_pi(reinterpret_cast<__m64*>(values + 4), _mm256_extractf128_ps(floats, 1));
}

// fp32 values as bf16 rounds them: to nearest, ties to even, any NaN to one.
LIBMOE_FAST_VECTORS inline Words round_to_bf16(Words bits) {
  const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Words up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const Words high = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
  const Floats value = _mm256_castsi256_ps(bits);
  const Words nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc00000), nan);
}

// 8 x 8 words: row i of `block` becomes column i.
LIBMOE_FAST_VECTORS inline void transpose(Words (&block)[8]) {
  __m256i pairs[8], quads[8];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(block[i], block[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(block[i], block[i + 1]);
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    block[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    block[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

#else

struct Words {
  uint32x4_t low, high;
};
struct Floats {
  float32x4_t low, high;
};

// Eight values, in fp32.
inline Words load_values(const float* values) {
  return {vreinterpretq_u32_f32(vld1q_f32(values)), vreinterpretq_u32_f32(vld1q_f32(values + 4))};
}
inline Words load_values(const BFloat16* values) {
  const uint16x8_t halves = vld1q_u16(reinterpret_cast<const uint16_t*>(values));
  return {vshll_n_u16(vget_low_u16(halves), 16), vshll_n_u16(vget_high_u16(halves), 16)};
}
inline Words no_words() { return {vdupq_n_u32(0), vdupq_n_u32(0)}; }
inline Floats as_floats(Words words) { return {vreinterpretq_f32_u32(words.low), vreinterpretq_f32_u32(words.high)}; }

inline Floats zeros() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
inline Floats load_floats(const float* values) { return {vld1q_f32(values), vld1q_f32(values + 4)}; }
inline void store_floats(float* values, Floats floats) {
  vst1q_f32(values, floats.low);
  vst1q_f32(values + 4, floats.high);
}
inline Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }

template <int kLane>
inline Floats add_product(Floats sum, float32x4_t left, Floats right) {
  return {vfmaq_laneq_f32(sum.low, right.low, left, kLane), vfmaq_laneq_f32(sum.high, right.high, left, kLane)};
}

template <int kRows, int... kRow>
inline void add_rows(Floats (&sum)[kRows][2], const float32x4_t (&left)[2], Floats right0, Floats right1,
                     std::integer_sequence<int, kRow...>) {
  ((sum[kRow][0] = add_product<kRow % 4>(sum[kRow][0], left[kRow / 4], right0),
    sum[kRow][1] = add_product<kRow % 4>(sum[kRow][1], left[kRow / 4], right1)),
   ...);
}

// sum += left (x) right, for kRows values of left: lanes of two registers, as one each would leave no room for the sums.
// Reads 4 values, or 6, all within a step of a left operand.
template <int kRows>
inline void add_products(Floats (&sum)[kRows][2], const float* left, Floats right0, Floats right1) {
  float32x4_t lanes[2] = {vld1q_f32(left), vdupq_n_f32(0)};
  if (kRows > 4) lanes[1] = vcombine_f32(vld1_f32(left + 4), vdup_n_f32(0));
  add_rows(sum, lanes, right0, right1, std::make_integer_sequence<int, kRows>());
}

inline void store_words(uint32_t* packed, Words words) {
  vst1q_u32(packed, words.low);
  vst1q_u32(packed + 4, words.high);
}
inline void store_six(float* values, Floats floats) {
  vst1q_f32(values, floats.low);
  vst1_f32(values + 4, vget_low_f32(floats.high));
}

// fp32 values as bf16 rounds them: to nearest, ties to even, any NaN to one.
inline uint32x4_t round_to_bf16(uint32x4_t bits) {
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t high = vandq_u32(up, vdupq_n_u32(0xffff0000));
  const float32x4_t value = vreinterpretq_f32_u32(bits);
  return vbslq_u32(vceqq_f32(value, value), high, vdupq_n_u32(0x7fc00000));
}
inline Words round_to_bf16(Words bits) { return {round_to_bf16(bits.low), round_to_bf16(bits.high)}; }

// 4 x 4 words: row i of the four becomes column i.
inline void transpose(uint32x4_t& a, uint32x4_t& b, uint32x4_t& c, uint32x4_t& d) {
  const uint32x4x2_t ab = vtrnq_u32(a, b), cd = vtrnq_u32(c, d);
  a = vcombine_u32(vget_low_u32(ab.val[0]), vget_low_u32(cd.val[0]));
  b = vcombine_u32(vget_low_u32(ab.val[1]), vget_low_u32(cd.val[1]));
  c = vcombine_u32(vget_high_u32(ab.val[0]), vget_high_u32(cd.val[0]));
  d = vcombine_u32(vget_high_u32(ab.val[1]), vget_high_u32(cd.val[1]));
}

// 8 x 8 words: row i of `block` becomes column i. Its four quarters by themselves, then two of them change places.
inline void transpose(Words (&block)[8]) {
  transpose(block[0].low, block[1].low, block[2].low, block[3].low);
  transpose(block[0].high, block[1].high, block[2].high, block[3].high);
  transpose(block[4].low, block[5].low, block[6].low, block[7].low);
  transpose(block[4].high, block[5].high, block[6].high, block[7].high);
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t kept = block[i].high;
    block[i].high = block[i + 4].low;
    block[i + 4].low = kept;
  }
}

#endif

}  // namespace libmoe_fast::narrow

#endif
