#include "scratch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "sanitizer.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace libmoe_fast {

namespace {

using torch::stable::Tensor;

constexpr size_t kLargePage = size_t{2} << 20;
// What follows the last whole large page of a tensor stays in small ones: else it would take up to 2 MiB more than it needs.
constexpr size_t kTensorStep = size_t{64} << 10;
constexpr size_t kSmallestTensor = size_t{1} << 20;  // below, torch's own allocation costs no page faults worth saving
constexpr size_t kDefaultKeptMegabytes = 1024;

struct Block {
  char* data;
  size_t bytes;
};

// Free blocks, and the size of every block handed out. Who takes one allows what it will use.
class BlockCache {
 public:
  char* take(size_t bytes) {
    const size_t rounded = round_up(bytes, kTensorStep);
    const std::lock_guard lock(mutex_);
    Block block = take_free(rounded);
    if (block.data == nullptr) block = allocate(rounded);
    return hand_out(block);
  }

  // For the intermediate results of one call at a time: the largest that was given back, grown if need be, so that a
  // small call and a large one that never overlap do not keep a block each.
  char* take_scratch(size_t bytes) {
    const size_t rounded = round_up(bytes, kLargePage);
    const std::lock_guard lock(mutex_);
    Block block{nullptr, 0};
    if (!free_scratch_.empty()) {
      block = free_scratch_.back();
      free_scratch_.pop_back();
      free_bytes_ -= block.bytes;
    }
    if (block.bytes < rounded) {
      std::free(block.data);
      block = allocate(rounded);
    }
    return hand_out(block);
  }

  void give_back(char* data) { give_back(data, free_); }
  void give_back_scratch(char* data) { give_back(data, free_scratch_); }

 private:
  static size_t round_up(size_t bytes, size_t step) {
    return std::max(kLargePage, (bytes + step - 1) / step * step);
  }

  char* hand_out(Block block) {
    in_use_[block.data] = block.bytes;
    forbid(block.data, block.bytes);
    return block.data;
  }

  void give_back(char* data, std::vector<Block>& free) {
    const std::lock_guard lock(mutex_);
    const auto entry = in_use_.find(data);
    forbid(data, entry->second);
    free.push_back({data, entry->second});
    free_bytes_ += entry->second;
    in_use_.erase(entry);
    std::sort(free_scratch_.begin(), free_scratch_.end(), [](Block a, Block b) { return a.bytes < b.bytes; });
    while (free_bytes_ > most_free_bytes_) {  // the longest unused goes first
      std::vector<Block>& from = free_.empty() ? free_scratch_ : free_;
      free_bytes_ -= from.front().bytes;
      std::free(from.front().data);
      from.erase(from.begin());
    }
  }

  static size_t most_free_bytes() {
    const char* megabytes = std::getenv("LIBMOE_FAST_CPU_CACHE_MB");
    return (megabytes == nullptr ? kDefaultKeptMegabytes : std::strtoull(megabytes, nullptr, 10)) << 20;
  }

  // The smallest that fits, unless more than a quarter of it would lie idle.
  Block take_free(size_t bytes) {
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes - bytes <= block->bytes / 4 + kLargePage;
      if (fits && (best == free_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == free_.end()) return {nullptr, 0};
    const Block block = *best;
    free_.erase(best);
    free_bytes_ -= block.bytes;
    return block;
  }

  static Block allocate(size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, kLargePage, bytes) != 0) throw std::bad_alloc();
#ifdef __linux__
    // Only a hint: 512 times fewer faults where large pages are to be had.
    madvise(data, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
    return {static_cast<char*>(data), bytes};
  }

  const size_t most_free_bytes_ = most_free_bytes();
  std::mutex mutex_;
  std::vector<Block> free_;          // the most recently freed last
  std::vector<Block> free_scratch_;  // the largest last
  size_t free_bytes_ = 0;
  std::unordered_map<char*, size_t> in_use_;
};

// Never destroyed: tensors may outlive every static object.
BlockCache& cache() {
  static auto* const blocks = new BlockCache;
  return *blocks;
}

void give_back(void* data) { cache().give_back(static_cast<char*>(data)); }

}  // namespace

Scratch::Scratch(const ScratchPlan& plan) : data_(cache().take_scratch(plan.bytes())) {
  for (const ScratchPlan::Part& part : plan.parts()) allow(data_ + part.offset, part.bytes);
}

Scratch::~Scratch() { cache().give_back_scratch(data_); }

Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) strides[d] = std::max<int64_t>(1, count);
  const size_t bytes = static_cast<size_t>(count) * element_size(dtype);
  if (bytes < kSmallestTensor) {
    AtenTensorHandle tensor = nullptr;
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));  // torch's own number
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                    code, aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
  }
  char* data = cache().take(bytes);
  allow(data, bytes);
  const torch::stable::Device cpu(torch::stable::DeviceType::CPU);
  return torch::stable::from_blob(data, sizes, strides, cpu, dtype, &give_back);
}

}  // namespace libmoe_fast
