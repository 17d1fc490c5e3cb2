#include "tiles.h"

#include <stdexcept>

#include "avx512.h"
#include "sanitizer.h"

namespace libmoe_fast {

#ifdef LIBMOE_FAST_TILES

bool rounds_in_hardware() { return has_avx512_bf16(); }

LIBMOE_FAST_AVX512_BF16 void store_rounded(BFloat16* matrix, int64_t stride, const float* tile, int rows, int columns) {
  const __mmask32 valid = columns == kTileColumns ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  for (int i = 0; i < rows; ++i, matrix += stride, tile += kTileColumns) {
    check_write(matrix, columns * sizeof(BFloat16));
    const __m512i row = round_to_bf16(tile);
    if (columns == kTileColumns) {
      _mm512_storeu_si512(matrix, row);
    } else {
      _mm512_mask_storeu_epi16(matrix, valid, row);
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
