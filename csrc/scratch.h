// Memory for the intermediate results of one call, and hints to the kernel about large pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace libmoe_fast {

// Adds up what a call needs, so that it is allocated once.
class ScratchPlan {
 public:
  // Offset of `count` values of type T, on a cache line of its own.
  template <typename T>
  size_t add(int64_t count) {
    const size_t offset = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 128;  // so that neighbours' prefetchers do not meet either
  size_t bytes_ = 0;
};

// Uninitialised memory. The last block freed is kept for the next call, because fresh pages cost a fault each (8% of a
// layer); blocks above kKeptBytes go back to the system.
class Scratch {
 public:
  static constexpr size_t kKeptBytes = size_t{128} << 20;

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
  size_t bytes_;
};

// Asks for 2 MiB pages behind a large result before it is written for the first time. Only a hint.
void advise_large_pages(void* data, size_t bytes);

}  // namespace libmoe_fast
