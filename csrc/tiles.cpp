#include "tiles.h"

#include <stdexcept>

#include "avx512.h"
#include "sanitizer.h"

namespace libmoe_fast {

#ifdef LIBMOE_FAST_AVX512

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

namespace {

LIBMOE_FAST_AVX512_BF16 void stream_rows(BFloat16* matrix, int64_t stride, const float* tile, int rows) {
  for (int i = 0; i < rows; ++i, matrix += stride, tile += kTileColumns) {
    check_write(matrix, kTileColumns * sizeof(BFloat16));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(matrix), round_to_bf16(tile));
  }
}

LIBMOE_FAST_AVX512 void stream_rows(float* matrix, int64_t stride, const float* tile, int rows) {
  for (int i = 0; i < rows; ++i, matrix += stride, tile += kTileColumns) {
    check_write(matrix, kTileColumns * sizeof(float));
    _mm512_stream_ps(matrix, _mm512_loadu_ps(tile));
    _mm512_stream_ps(matrix + 16, _mm512_loadu_ps(tile + 16));
  }
}

bool at_line_start(const void* data) { return reinterpret_cast<uintptr_t>(data) % kCacheLine == 0; }

}  // namespace

template <typename T>
void stream_tile(T* matrix, int64_t stride, const float* tile, int rows, int columns) {
  const bool whole_lines = columns == kTileColumns && at_line_start(matrix) && at_line_start(matrix + stride);
  if (!whole_lines || !has_avx512()) return store_tile<T>(matrix, stride, tile, rows, columns);
  stream_rows(matrix, stride, tile, rows);
}

void finish_streams() { _mm_sfence(); }

#else

bool rounds_in_hardware() { return false; }

void store_rounded(BFloat16*, int64_t, const float*, int, int) {
  throw std::logic_error("libmoe_fast: this machine does not round to bf16");
}

template <typename T>
void stream_tile(T* matrix, int64_t stride, const float* tile, int rows, int columns) {
  store_tile<T>(matrix, stride, tile, rows, columns);
}

void finish_streams() {}

#endif

template void stream_tile<float>(float*, int64_t, const float*, int, int);
template void stream_tile<BFloat16>(BFloat16*, int64_t, const float*, int, int);

}  // namespace libmoe_fast
