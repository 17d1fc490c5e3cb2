// Launches of the row kernels: from a run-time dtype and alignment to a kernel.
#include "launchers.h"
#include "rows.cuh"

namespace libmoe_fast::cuda {

namespace {

constexpr int64_t kVectorBytes = 16;
constexpr int64_t kMaxPieces = 65535;  // of a row: the limit of gridDim.y

template <typename... Pointers>
bool aligned(int64_t row_bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) | static_cast<uintptr_t>(row_bytes)) % kVectorBytes == 0;
}

template <typename T, int kWidth>
const Vector<T, kWidth>* vectors_of(const void* pointer) {
  return static_cast<const Vector<T, kWidth>*>(pointer);
}

// Calls body.operator()<T, kWidth>(vectors per row): 16 bytes at a time where `wide`, else one element.
template <typename T, typename Body>
const char* with_width(bool wide, int64_t width, const Body& body) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  return wide ? body.template operator()<T, kWidth>(width / kWidth) : body.template operator()<T, 1>(width);
}

template <typename Body, typename... Pointers>
const char* dispatch(Dtype dtype, int64_t width, const Body& body, Pointers... pointers) {
  const auto wide = [&](int64_t element) { return aligned(width * element, pointers...); };
  switch (dtype) {
    case Dtype::kBFloat16: return with_width<__nv_bfloat16>(wide(2), width, body);
    case Dtype::kFloat16: return with_width<__half>(wide(2), width, body);
    case Dtype::kFloat32: return with_width<float>(wide(4), width, body);
    case Dtype::kFloat64: return with_width<double>(wide(8), width, body);
  }
  return "unknown dtype";
}

// Blocks for a warp per row in x, and the pieces of a row in y.
dim3 grid(int64_t rows, int64_t pieces) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kWarps)), static_cast<unsigned>(pieces));
}

const char* too_large(int64_t rows, int64_t pieces) {
  if (pieces > kMaxPieces) return "the rows are too wide";
  return ceil_div(rows, kWarps) > INT32_MAX ? "there are too many rows" : nullptr;
}

int64_t pieces_of(int64_t vectors) { return ceil_div(vectors, kLanes * kUnroll); }

}  // namespace

const char* gather(Dtype dtype, const void* x, const int64_t* order, const void* weights, void* out, int64_t rows,
                   int64_t width, int64_t top_k, void* stream) {
  if (rows == 0 || width == 0) return nullptr;
  const auto run = [&]<typename T, int kWidth>(int64_t vectors) {
    const int64_t pieces = pieces_of(vectors);
    if (const char* error = too_large(rows, pieces)) return error;
    return launch(gather_rows<T, kWidth>, grid(rows, pieces), 0, stream, vectors_of<T, kWidth>(x), order,
                  static_cast<const Accumulator<T>*>(weights), static_cast<Vector<T, kWidth>*>(out), rows, vectors,
                  top_k);
  };
  return dispatch(dtype, width, run, x, out);
}

const char* weighted_scatter(Dtype dtype, const void* y, const int64_t* inverse, const void* weights, void* out,
                             int64_t tokens, int64_t width, int64_t top_k, void* stream) {
  if (tokens == 0 || width == 0) return nullptr;
  const auto run = [&]<typename T, int kWidth>(int64_t vectors) {
    const int64_t pieces = pieces_of(vectors);
    if (const char* error = too_large(tokens, pieces)) return error;
    return launch(combine_rows<T, kWidth>, grid(tokens, pieces), 0, stream, vectors_of<T, kWidth>(y), inverse,
                  static_cast<const Accumulator<T>*>(weights), static_cast<Vector<T, kWidth>*>(out), tokens, vectors,
                  top_k);
  };
  return dispatch(dtype, width, run, y, out);
}

const char* row_dot(Dtype dtype, const void* a, const void* b, const int64_t* inverse, void* out, int64_t tokens,
                    int64_t width, int64_t top_k, void* stream) {
  const int64_t rows = tokens * top_k;
  if (rows == 0) return nullptr;
  const auto run = [&]<typename T, int kWidth>(int64_t vectors) {
    if (const char* error = too_large(rows, 1)) return error;
    return launch(dot_rows<T, kWidth>, grid(rows, 1), 0, stream, vectors_of<T, kWidth>(a), vectors_of<T, kWidth>(b),
                  inverse, static_cast<Accumulator<T>*>(out), rows, vectors, top_k);
  };
  return dispatch(dtype, width, run, a, b);
}

}  // namespace libmoe_fast::cuda
