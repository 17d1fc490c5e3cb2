// Tensors for the ops, past torch's dispatcher where it has nothing to do: a call through it takes a microsecond, and ten
// where its code is in no cache, as in a layer of a model that does other things in between.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "dtypes.h"

namespace libmoe_fast {

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<torch::stable::Tensor> as_contiguous(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

inline torch::stable::Tensor with_dtype(const torch::stable::Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

}  // namespace libmoe_fast
