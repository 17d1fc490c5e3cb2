// The CUDA side of the ops that ../ops.cpp defines: argument checks, memory from torch's allocator, torch's current
// stream. In a library of its own, so that a torch without CUDA never has to load it.
//
// Like the CPU ops, except for one check: whether an index, or an entry of order or inverse, is in its range is known
// only on the device, and asking would mean to wait for it (and could not be captured in a CUDA graph). Entries outside
// never lead to an access outside: see launchers.h for what they do instead.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "launchers.h"

// As in ../ops.cpp.
extern "C" __attribute__((used, visibility("default"))) const char libmoe_fast_built_with[] =
    "libmoe_fast built with torch " LIBMOE_FAST_TORCH_VERSION;

namespace libmoe_fast {

namespace {

// Makes the device of a tensor the current one while it lives, and knows torch's stream there.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    // stable::accelerator::Stream gives its native handle from torch 2.13 on only.
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle_));
  }

  void* handle() const { return handle_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* handle_ = nullptr;
};

void require_launched(const ArgumentCheck& check, const char* error) {
  if (error != nullptr) check.fail("the CUDA kernel could not be started: ", error);
}

cuda::Dtype row_dtype(const Tensor& rows) {
  switch (rows.scalar_type()) {
    case ScalarType::BFloat16: return cuda::Dtype::kBFloat16;
    case ScalarType::Half: return cuda::Dtype::kFloat16;
    case ScalarType::Float: return cuda::Dtype::kFloat32;
    default: return cuda::Dtype::kFloat64;  // ArgumentCheck::floating has excluded all others
  }
}

const void* data_or_null(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> permute_index(const Tensor& index, int64_t num_experts) {
  const ArgumentCheck check("permute_index", index.device());
  check.between(num_experts, "num_experts", 1, cuda::kMaxExperts);
  check.shape(index, "index", "[T, K]", {-1, -1});
  check.int64(index, "index");
  const Stream stream(index);
  const Tensor experts = torch::stable::contiguous(index);

  const int64_t choices = experts.numel();
  Tensor order = torch::stable::new_empty(experts, {choices});            // [T*K]
  Tensor inverse = torch::stable::new_empty(experts, {choices});          // [T*K]
  Tensor offsets = torch::stable::new_empty(experts, {num_experts + 1});  // [N+1]
  Tensor scratch = torch::stable::new_empty(experts, {cuda::permute_index_scratch(choices, num_experts)});
  require_launched(check, cuda::permute_index(experts.const_data_ptr<int64_t>(), choices, num_experts,
                                              scratch.mutable_data_ptr<int64_t>(), order.mutable_data_ptr<int64_t>(),
                                              inverse.mutable_data_ptr<int64_t>(),
                                              offsets.mutable_data_ptr<int64_t>(), stream.handle()));
  return {order, inverse, offsets};
}

Tensor gather(const Tensor& x, const Tensor& order, int64_t top_k, const std::optional<Tensor>& weights) {
  const ArgumentCheck check("gather", x.device());
  check.between(top_k, "top_k", 1, INT32_MAX);
  check.shape(x, "x", "[T, D]", {-1, -1});
  check.floating(x, "x");
  check.shape(order, "order", "[T*top_k]", {-1});
  check.int64(order, "order");
  const int64_t tokens = x.size(0), width = x.size(1), rows = order.size(0);
  check.choices(rows, "order", tokens, top_k);
  const Stream stream(x);
  const std::optional<Tensor> gate = check.weights(weights, tokens, top_k, x, "x");  // [T, K]
  const Tensor source = torch::stable::contiguous(x);
  const Tensor positions = torch::stable::contiguous(order);

  Tensor out = torch::stable::new_empty(source, {rows, width});  // [T*K, D]
  require_launched(check, cuda::gather(row_dtype(x), source.const_data_ptr(), positions.const_data_ptr<int64_t>(),
                                       data_or_null(gate), out.mutable_data_ptr(), rows, width, top_k,
                                       stream.handle()));
  return out;
}

Tensor weighted_scatter(const Tensor& y, const Tensor& inverse, int64_t top_k, const std::optional<Tensor>& weights) {
  const ArgumentCheck check("weighted_scatter", y.device());
  check.between(top_k, "top_k", 1, INT32_MAX);
  check.shape(inverse, "inverse", "[T*top_k]", {-1});
  check.int64(inverse, "inverse");
  const int64_t rows = inverse.size(0), tokens = rows / top_k;
  check.choices(rows, "inverse", tokens, top_k);
  check.shape(y, "y", "[T*top_k, O]", {rows, -1});
  check.floating(y, "y");
  const int64_t width = y.size(1);
  const Stream stream(y);
  const std::optional<Tensor> gate = check.weights(weights, tokens, top_k, y, "y");  // [T, K]
  const Tensor source = torch::stable::contiguous(y);
  const Tensor positions = torch::stable::contiguous(inverse);

  Tensor out = torch::stable::new_empty(source, {tokens, width});  // [T, O]
  require_launched(check, cuda::weighted_scatter(row_dtype(y), source.const_data_ptr(),
                                                 positions.const_data_ptr<int64_t>(), data_or_null(gate),
                                                 out.mutable_data_ptr(), tokens, width, top_k, stream.handle()));
  return out;
}

Tensor row_dot(const Tensor& a, const Tensor& b, const Tensor& inverse, int64_t top_k) {
  const ArgumentCheck check("row_dot", a.device());
  check.between(top_k, "top_k", 1, INT32_MAX);
  check.shape(b, "b", "[T, O]", {-1, -1});
  check.floating(b, "b");
  const int64_t tokens = b.size(0), width = b.size(1);
  check.shape(inverse, "inverse", "[T*top_k]", {-1});
  check.int64(inverse, "inverse");
  const int64_t rows = inverse.size(0);
  check.choices(rows, "inverse", tokens, top_k);
  check.shape(a, "a", "[T*top_k, O]", {rows, width});
  check.same_dtype(a, "a", b, "b");
  const Stream stream(a);
  const Tensor left = torch::stable::contiguous(a);
  const Tensor right = torch::stable::contiguous(b);
  const Tensor positions = torch::stable::contiguous(inverse);

  Tensor out = torch::stable::new_empty(left, {tokens, top_k}, accumulator_dtype(a.scalar_type()));  // [T, K]
  require_launched(check, cuda::row_dot(row_dtype(a), left.const_data_ptr(), right.const_data_ptr(),
                                        positions.const_data_ptr<int64_t>(), out.mutable_data_ptr(), tokens, width,
                                        top_k, stream.handle()));
  return out;
}

}  // namespace

}  // namespace libmoe_fast

STABLE_TORCH_LIBRARY_IMPL(libmoe_fast, CUDA, m) {
  m.impl("permute_index", TORCH_BOX(&libmoe_fast::permute_index));
  m.impl("gather", TORCH_BOX(&libmoe_fast::gather));
  m.impl("weighted_scatter", TORCH_BOX(&libmoe_fast::weighted_scatter));
  m.impl("row_dot", TORCH_BOX(&libmoe_fast::row_dot));
}
