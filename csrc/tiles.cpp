#include "tiles.h"

#include <stdexcept>

#include "avx512.h"

namespace libmoe_fast {

#ifdef LIBMOE_FAST_TILES

bool rounds_in_hardware() {
  static const bool supported = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
  return supported;
}

LIBMOE_FAST_AVX512_BF16 void store_rounded(BFloat16* matrix, int64_t stride, const float* tile, int rows, int columns) {
  const __mmask32 valid = columns == kTileColumns ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  for (int i = 0; i < rows; ++i, matrix += stride, tile += kTileColumns) {
    check_write(matrix, columns * sizeof(BFloat16));
    const __m512bh row = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(tile + 16), _mm512_loadu_ps(tile));
    if (columns == kTileColumns) {
      _mm512_storeu_si512(matrix, reinterpret_cast<__m512i>(row));
    } else {
      _mm512_mask_storeu_epi16(matrix, valid, reinterpret_cast<__m512i>(row));
    }
  }
}

#else

bool rounds_in_hardware() { return false; }

void store_rounded(BFloat16*, int64_t, const float*, int, int) {
  throw std::logic_error("libmoe_fast: this machine does not round to bf16");
}

#endif

}  // namespace libmoe_fast
