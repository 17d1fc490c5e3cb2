// Eight 32-bit words at a time, as one register of AVX2 or two of NEON: what narrow.cpp is written in.
#pragma once

#include "instructions.h"

#ifdef LIBMOE_FAST_NARROW

#include <cstdint>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#define LIBMOE_FAST_VECTORS __attribute__((target("avx2,fma")))
#else
#include <arm_neon.h>
#define LIBMOE_FAST_VECTORS
#endif

namespace libmoe_fast::narrow {

#ifdef __x86_64__

using Words = __m256i;
using Floats = __m256;

// Rows that are multiplied at a time: 12 sums, 2 right words and 1 left, in 16 registers.
template <typename T>
constexpr int kMostRows = 6;

LIBMOE_FAST_VECTORS inline Words load_words(const void* words) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(words));
}
LIBMOE_FAST_VECTORS inline Words no_words() { return _mm256_setzero_si256(); }
LIBMOE_FAST_VECTORS inline Floats as_floats(Words words) { return _mm256_castsi256_ps(words); }
// The two values of each bf16 word.
LIBMOE_FAST_VECTORS inline Floats first_value(Words words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
LIBMOE_FAST_VECTORS inline Floats second_value(Words words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

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

// The first `count` words: 8, or 6, which is what is left of a left operand.
LIBMOE_FAST_VECTORS inline void store_words(uint32_t* packed, int count, Words words) {
  if (count == 8) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed), words);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(words));
  _mm_storeu_si64(packed + 4, _mm256_extracti128_si256(words, 1));
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

// Rows that are multiplied at a time: 24 registers of sums, 4 of right words and 2 of left values, of 32. Words of bf16 need
// room for their values.
template <typename T>
constexpr int kMostRows = sizeof(T) == 4 ? 6 : 5;

inline Words load_words(const void* words) {
  const auto* bytes = static_cast<const uint8_t*>(words);  // rows of bf16 begin at any two bytes
  return {vreinterpretq_u32_u8(vld1q_u8(bytes)), vreinterpretq_u32_u8(vld1q_u8(bytes + 16))};
}
inline Words no_words() { return {vdupq_n_u32(0), vdupq_n_u32(0)}; }
inline Floats as_floats(Words words) { return {vreinterpretq_f32_u32(words.low), vreinterpretq_f32_u32(words.high)}; }
// The two values of each bf16 word.
inline Floats first_value(Words words) { return as_floats({vshlq_n_u32(words.low, 16), vshlq_n_u32(words.high, 16)}); }
inline Floats second_value(Words words) {
  const uint32x4_t mask = vdupq_n_u32(0xffff0000);
  return as_floats({vandq_u32(words.low, mask), vandq_u32(words.high, mask)});
}

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

// The first `count` words: 8, or 6, which is what is left of a left operand.
inline void store_words(uint32_t* packed, int count, Words words) {
  vst1q_u32(packed, words.low);
  if (count == 8) return vst1q_u32(packed + 4, words.high);
  vst1_u32(packed + 4, vget_low_u32(words.high));
}

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
