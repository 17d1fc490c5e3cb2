#include "scratch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <numeric>
#include <unordered_map>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace libmoe_fast {

namespace {

using torch::stable::Tensor;

constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kSmallestTensor = size_t{1} << 20;  // below, torch's own allocation costs no page faults worth saving
constexpr size_t kDefaultKeptMegabytes = 1024;

struct Block {
  char* data;
  size_t bytes;
};

// Free blocks, the most recently freed last, and the size of every block handed out.
class BlockCache {
 public:
  char* take(size_t bytes) {
    const size_t rounded = std::max(kLargePage, (bytes + kLargePage - 1) / kLargePage * kLargePage);
    const std::lock_guard lock(mutex_);
    Block block = take_free(rounded);
    if (block.data == nullptr) block = allocate(rounded);
    in_use_[block.data] = block.bytes;
    return block.data;
  }

  void give_back(char* data) {
    const std::lock_guard lock(mutex_);
    const auto entry = in_use_.find(data);
    free_.push_back({data, entry->second});
    free_bytes_ += entry->second;
    in_use_.erase(entry);
    while (free_bytes_ > most_free_bytes_) {  // the longest unused goes first
      free_bytes_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.erase(free_.begin());
    }
  }

 private:
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
    auto* data = static_cast<char*>(std::aligned_alloc(kLargePage, bytes));
    if (data == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(data, bytes, MADV_HUGEPAGE);  // only a hint: 512 times fewer faults where large pages are to be had
#endif
    return {data, bytes};
  }

  const size_t most_free_bytes_ = most_free_bytes();
  std::mutex mutex_;
  std::vector<Block> free_;
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

Scratch::Scratch(const ScratchPlan& plan) : data_(cache().take(plan.bytes())) {}

Scratch::~Scratch() { give_back(data_); }

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  const size_t bytes = static_cast<size_t>(count) * static_cast<size_t>(like.element_size());
  if (bytes < kSmallestTensor) return torch::stable::new_empty(like, sizes);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = count;
  for (size_t d = 0; d < strides.size(); ++d) strides[d] = stride /= sizes.begin()[d];
  return torch::stable::from_blob(cache().take(bytes), sizes, strides, like.device(), like.scalar_type(), &give_back);
}

}  // namespace libmoe_fast
