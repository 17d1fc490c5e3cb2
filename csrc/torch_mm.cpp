#include "torch_mm.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <type_traits>

namespace libmoe_fast {

namespace {

using torch::stable::Tensor;

template <typename T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
}

template <typename T>
Tensor view(const Matrix<T>& matrix) {
  std::array<int64_t, 2> sizes{matrix.rows, matrix.columns}, strides{matrix.columns, 1};
  if (matrix.transposed) {
    std::swap(sizes[0], sizes[1]);
    std::swap(strides[0], strides[1]);
  }
  // from_blob has no view of constant memory; operands of mm are only read.
  return torch::stable::from_blob(const_cast<T*>(matrix.data), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_of<T>());
}

}  // namespace

template <typename T>
void torch_mm(T* out, const Matrix<T>& left, const Matrix<T>& right) {
  const Tensor a = view(left), b = view(right);
  const Tensor result = view(Matrix<T>{out, a.size(0), b.size(1)});
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(result)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes, and drops, the reference that was returned
}

template void torch_mm(float*, const Matrix<float>&, const Matrix<float>&);
template void torch_mm(double*, const Matrix<double>&, const Matrix<double>&);
template void torch_mm(BFloat16*, const Matrix<BFloat16>&, const Matrix<BFloat16>&);
template void torch_mm(Half*, const Matrix<Half>&, const Matrix<Half>&);

}  // namespace libmoe_fast
