// Large blocks of memory, kept for the next call.
//
// The system hands out a large block as pages that fault, and are cleared, one by one when they are first written: 8% of
// a layer's time and more. Blocks freed here are kept, up to a bound, and handed out again.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace libmoe_fast {

// Adds up what a call needs, so that it is allocated once.
class ScratchPlan {
 public:
  struct Part {
    size_t offset, bytes;
  };

  // Offset of `count` values of type T, on a cache line of its own. A gap follows, which no one may touch.
  template <typename T>
  size_t add(int64_t count) {
    const Part part{bytes_, static_cast<size_t>(count) * sizeof(T)};
    parts_.push_back(part);
    bytes_ += part.bytes / kAlignment * kAlignment + kAlignment;
    return part.offset;
  }
  size_t bytes() const { return bytes_; }
  const std::vector<Part>& parts() const { return parts_; }

 private:
  static constexpr size_t kAlignment = 128;  // so that neighbours' prefetchers do not meet either
  size_t bytes_ = 0;
  std::vector<Part> parts_;
};

// Uninitialised memory for the intermediate results of one call.
class Scratch {
 public:
  explicit Scratch(const ScratchPlan& plan);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  char* data_;
};

// An uninitialised contiguous CPU tensor; a large one comes from the kept blocks.
torch::stable::Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace libmoe_fast
