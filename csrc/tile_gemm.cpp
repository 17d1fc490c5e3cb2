#include "tile_gemm.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "avx512.h"

namespace libmoe_fast {

namespace {

// The setting is checked on every machine, also where there is no choice.
bool torch_mm_demanded() {
  const char* choice = std::getenv("LIBMOE_FAST_CPU_GEMM");
  if (choice == nullptr || *choice == '\0') return false;
  if (std::string(choice) != "torch") {
    throw std::runtime_error(std::string("libmoe_fast: LIBMOE_FAST_CPU_GEMM is '") + choice +
                             "'; expected torch, for torch's mm, or nothing, for the faster way here");
  }
  return true;
}

}  // namespace

#ifdef LIBMOE_FAST_TILES

bool tiles_pay(ScalarType dtype) {
  // AMX multiplies bf16 many times faster than AVX-512, and oneDNN, behind torch's mm, uses it.
  static const bool bf16 = has_avx512_bf16() && !__builtin_cpu_supports("amx-bf16");
  if (torch_mm_demanded()) return false;
  return dtype == ScalarType::Float ? has_avx512() : dtype == ScalarType::BFloat16 && bf16;
}

namespace {

// row = sum, or row += sum
LIBMOE_FAST_AVX512 inline void store_sums(float* row, const __m512 (&sum)[2], bool add) {
  _mm512_storeu_ps(row, add ? _mm512_add_ps(_mm512_loadu_ps(row), sum[0]) : sum[0]);
  _mm512_storeu_ps(row + 16, add ? _mm512_add_ps(_mm512_loadu_ps(row + 16), sum[1]) : sum[1]);
}

template <int kRows>
LIBMOE_FAST_AVX512_BF16 void multiply_bf16(int64_t steps, const uint32_t* left, const uint32_t* right, float* tile,
                                           bool add, Ahead ahead) {
  __m512 sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (; steps > 0; --steps, left += kTileRows, right += kTileColumns) {
    _mm_prefetch(ahead.data, _MM_HINT_T1);
    ahead.data += ahead.bytes_per_step;
    const __m512bh right0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right));
    const __m512bh right1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(right + 16));
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512bh word = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(left[i])));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], word, right0);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], word, right1);
    }
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) store_sums(tile + i * kTileColumns, sum[i], add);
}

template <int kRows>
LIBMOE_FAST_AVX512 void multiply_fp32(int64_t steps, const uint32_t* left, const uint32_t* right, float* tile,
                                           bool add, Ahead ahead) {
  __m512 sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (; steps > 0; --steps, left += kTileRows, right += kTileColumns) {
    _mm_prefetch(ahead.data, _MM_HINT_T1);
    ahead.data += ahead.bytes_per_step;
    const __m512 right0 = _mm512_loadu_ps(right), right1 = _mm512_loadu_ps(right + 16);
    LIBMOE_FAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const __m512 word = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(left[i])));
      sum[i][0] = _mm512_fmadd_ps(word, right0, sum[i][0]);
      sum[i][1] = _mm512_fmadd_ps(word, right1, sum[i][1]);
    }
  }
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) store_sums(tile + i * kTileColumns, sum[i], add);
}

// Sums of sums lose less than one long sum: the error of torch's mm, which also works in blocks.
constexpr int64_t kStepsPerSum = 512;

using Multiply = void (*)(int64_t, const uint32_t*, const uint32_t*, float*, bool, Ahead);
constexpr Multiply kMultiplyBf16[] = {multiply_bf16<2>, multiply_bf16<4>,  multiply_bf16<6>, multiply_bf16<8>,
                                      multiply_bf16<10>, multiply_bf16<12>, multiply_bf16<14>};
constexpr Multiply kMultiplyFp32[] = {multiply_fp32<2>, multiply_fp32<4>,  multiply_fp32<6>, multiply_fp32<8>,
                                      multiply_fp32<10>, multiply_fp32<12>, multiply_fp32<14>};

}  // namespace

template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const uint32_t* right, float* tile, Ahead ahead) {
  const auto& table = std::is_same_v<T, float> ? kMultiplyFp32 : kMultiplyBf16;
  for (int64_t done = 0; done < steps; done += kStepsPerSum) {
    table[(rows - 1) / 2](std::min(kStepsPerSum, steps - done), left + done * kTileRows, right + done * kTileColumns,
                          tile, done > 0, {ahead.data + done * ahead.bytes_per_step, ahead.bytes_per_step});
  }
}

#else  // No instructions for which this layout was made: torch's mm does the work, and none of these is called.

bool tiles_pay(ScalarType) {
  torch_mm_demanded();
  return false;
}

template <typename T>
void multiply_tile(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead) {
  throw std::logic_error("libmoe_fast: tiles are not used on this machine");
}

#endif

template void multiply_tile<float>(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead);
template void multiply_tile<BFloat16>(int, int64_t, const uint32_t*, const uint32_t*, float*, Ahead);

}  // namespace libmoe_fast
