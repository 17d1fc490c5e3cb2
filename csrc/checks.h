// Argument checks of the ops. Every message names the op, the argument, what was expected and what was given.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtypes.h"

namespace libmoe_fast {

using torch::stable::Device;
using torch::stable::DeviceType;
using torch::stable::Tensor;

class ArgumentCheck {
 public:
  // `device`: where all tensors must be.
  explicit ArgumentCheck(const char* op, const Device& device = Device(DeviceType::CPU)) : op_(op), device_(device) {}

  // A tensor of this shape on the device, e.g. shape(x, "x", "[T, D]", {T, -1}); -1 stands for any size.
  void shape(const Tensor& tensor, const char* name, const char* letters, std::initializer_list<int64_t> sizes) const;
  void int64(const Tensor& tensor, const char* name) const;
  void floating(const Tensor& tensor, const char* name) const;
  void same_dtype(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) const;
  void between(int64_t value, const char* name, int64_t lowest, int64_t highest) const;
  // `rows` is the length of `name`, which must be tokens * top_k (compared without forming the product).
  void choices(int64_t rows, const char* name, int64_t tokens, int64_t top_k) const;
  // Every entry of a contiguous int64 tensor lies in [0, bound): nothing is read or written out of bounds later.
  void entries(const Tensor& tensor, const char* name, int64_t bound) const;
  // Optional gate weights [T, K], in fp32 or the rows' dtype; returned contiguous, in the accumulator's dtype.
  std::optional<Tensor> weights(const std::optional<Tensor>& weights, int64_t tokens, int64_t top_k,
                                const Tensor& rows, const char* rows_name) const;

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream message;
    message << "libmoe_fast::" << op_ << ": ";
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }

 private:
  const char* op_;
  Device device_;
};

}  // namespace libmoe_fast
