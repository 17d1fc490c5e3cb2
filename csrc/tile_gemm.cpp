#include "tile_gemm.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "avx512.h"
#include "narrow.h"
#include "packing.h"

namespace libmoe_fast {

namespace {

enum class Gemm { best, torch, tiles };

// The setting is checked on every machine, also where there is no choice.
Gemm demanded() {
  const char* choice = std::getenv("LIBMOE_FAST_CPU_GEMM");
  const std::string gemm = choice == nullptr ? "" : choice;
  if (gemm.empty()) return Gemm::best;
  if (gemm == "torch") return Gemm::torch;
  if (gemm == "tiles") return Gemm::tiles;
  throw std::runtime_error("libmoe_fast: LIBMOE_FAST_CPU_GEMM is '" + gemm +
                           "'; expected torch, for torch's mm, tiles, for our own wherever this machine has the "
                           "instructions, or nothing, for the faster way here");
}

}  // namespace

bool tiles_pay([[maybe_unused]] ScalarType dtype) {
  const Gemm gemm = demanded();
  if (!has_narrow() || gemm == Gemm::torch) return false;
#ifdef LIBMOE_FAST_AVX512
  if (!has_avx512()) return true;
  const bool bf16 = dtype == ScalarType::BFloat16;
  // AMX multiplies bf16 many times faster than AVX-512, and oneDNN, behind torch's mm, uses it.
  const bool faster = !bf16 || !__builtin_cpu_supports("amx-bf16");
  return (!bf16 || has_avx512_bf16()) && (gemm == Gemm::tiles || faster);
#else
  // Where they are faster on ARM, whose libraries differ between machines, nobody has measured: only where asked for.
  return gemm == Gemm::tiles;
#endif
}

#ifdef LIBMOE_FAST_AVX512

namespace {

// row = sum, or row += sum
LIBMOE_FAST_AVX512 inline void store_sums(float* row, const __m512 (&sum)[2], bool add) {
  _mm512_storeu_ps(row, add ? _mm512_add_ps(_mm512_loadu_ps(row), sum[0]) : sum[0]);
  _mm512_storeu_ps(row + 16, add ? _mm512_add_ps(_mm512_loadu_ps(row + 16), sum[1]) : sum[1]);
}

// Right operands, a step at a time: packed ones, and rows that are packed on the way.
template <typename T>
struct PackedRight {
  const uint32_t* words;

  LIBMOE_FAST_AVX512 void next(__m512i (&step)[2]) {
    step[0] = _mm512_loadu_si512(words);
    step[1] = _mm512_loadu_si512(words + 16);
    words += kTileColumns;
  }
};

template <typename T>
struct RightRows {
  const T* const* rows;
  int64_t column, steps;
  uint32_t* packed;

  LIBMOE_FAST_AVX512 void next(__m512i (&step)[2]) {
    if (--steps >= kRowsAhead / kPerWord<T>) {
      for (int i = 0; i < kPerWord<T>; ++i) _mm_prefetch(rows[kRowsAhead + i] + column, _MM_HINT_T1);
    }
    load_step(rows, column, step);
    rows += kPerWord<T>;
    _mm512_storeu_si512(packed, step[0]);
    _mm512_storeu_si512(packed + 16, step[1]);
    packed += kTileColumns;
  }
};

template <int kRows, typename Right>
LIBMOE_FAST_AVX512_BF16 void multiply(int64_t steps, const uint32_t* left, Right right, float* tile, bool add,
                                      Ahead ahead, BFloat16) {
  __m512 sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (; steps > 0; --steps, left += kTileRows) {
    _mm_prefetch(ahead.data, _MM_HINT_T1);
    ahead.data += ahead.bytes_per_step;
    __m512i words[2];
    right.next(words);
    const auto right0 = reinterpret_cast<__m512bh>(words[0]), right1 = reinterpret_cast<__m512bh>(words[1]);
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

template <int kRows, typename Right>
LIBMOE_FAST_AVX512 void multiply(int64_t steps, const uint32_t* left, Right right, float* tile, bool add, Ahead ahead,
                                 float) {
  __m512 sum[kRows][2];
  LIBMOE_FAST_UNROLL
  for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (; steps > 0; --steps, left += kTileRows) {
    _mm_prefetch(ahead.data, _MM_HINT_T1);
    ahead.data += ahead.bytes_per_step;
    __m512i words[2];
    right.next(words);
    const __m512 right0 = _mm512_castsi512_ps(words[0]), right1 = _mm512_castsi512_ps(words[1]);
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

template <typename T, typename Right>
using Multiply = void (*)(int64_t, const uint32_t*, Right, float*, bool, Ahead, T);
template <typename T, typename Right>
constexpr Multiply<T, Right> kMultiply[] = {multiply<2, Right>,  multiply<4, Right>,  multiply<6, Right>,
                                            multiply<8, Right>,  multiply<10, Right>, multiply<12, Right>,
                                            multiply<14, Right>};

// right_from(step): the right operand from a step on.
template <typename T, typename RightFrom>
void multiply_in_parts(int rows, int64_t steps, const uint32_t* left, const RightFrom& right_from, float* tile,
                       const Ahead& ahead) {
  for (int64_t done = 0; done < steps; done += kStepsPerSum) {
    const auto right = right_from(done);
    kMultiply<T, std::decay_t<decltype(right)>>[(rows - 1) / 2](
        std::min(kStepsPerSum, steps - done), left + done * kTileRows, right, tile, done > 0,
        ahead.after(done), T());
  }
}

}  // namespace

#endif

template <typename T>
void multiply_tile(int rows, int64_t steps, const uint32_t* left, const Panel& right, float* tile, const Ahead& ahead) {
#ifdef LIBMOE_FAST_AVX512
  if (has_avx512()) {
    const auto right_from = [&](int64_t step) {
      return PackedRight<T>{right.words + (right.first + step) * kTileColumns};
    };
    return multiply_in_parts<T>(rows, steps, left, right_from, tile, ahead);
  }
#endif
  narrow::multiply_tile(rows, steps, left, right, tile, ahead);
}

template <typename T>
void multiply_tile_packing(int rows, int64_t steps, const uint32_t* left, const T* const* right, int64_t column,
                           uint32_t* packed, float* tile, const Ahead& ahead) {
#ifdef LIBMOE_FAST_AVX512
  if (has_avx512()) {
    const auto right_from = [=](int64_t step) {
      return RightRows<T>{right + step * kPerWord<T>, column, steps - step, packed + step * kTileColumns};
    };
    return multiply_in_parts<T>(rows, steps, left, right_from, tile, ahead);
  }
#endif
  narrow::multiply_tile_packing<T>(rows, steps, left, right, column, packed, tile, ahead);
}

template void multiply_tile<float>(int, int64_t, const uint32_t*, const Panel&, float*, const Ahead&);
template void multiply_tile<BFloat16>(int, int64_t, const uint32_t*, const Panel&, float*, const Ahead&);
template void multiply_tile_packing(int, int64_t, const uint32_t*, const float* const*, int64_t, uint32_t*, float*,
                                    const Ahead&);
template void multiply_tile_packing(int, int64_t, const uint32_t*, const BFloat16* const*, int64_t, uint32_t*, float*,
                                    const Ahead&);

}  // namespace libmoe_fast
