#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace libmoe_fast {

namespace {

constexpr size_t kLargePage = size_t{2} << 20;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

std::mutex kept_mutex;
Block kept;

Block take_kept(size_t bytes) {
  const std::lock_guard lock(kept_mutex);
  return kept.bytes >= bytes ? std::exchange(kept, Block{}) : Block{};
}

Block allocate(size_t bytes) {
  const size_t rounded = (bytes + kLargePage - 1) / kLargePage * kLargePage;
  auto* data = static_cast<char*>(std::aligned_alloc(kLargePage, rounded));
  if (data == nullptr) throw std::bad_alloc();
  advise_large_pages(data, rounded);
  return {data, rounded};
}

// Keeps the larger of this block and the kept one, and returns the other.
Block keep(Block block) {
  if (block.bytes > Scratch::kKeptBytes) return block;
  const std::lock_guard lock(kept_mutex);
  return kept.bytes < block.bytes ? std::exchange(kept, block) : block;
}

}  // namespace

Scratch::Scratch(const ScratchPlan& plan) {
  Block block = take_kept(plan.bytes());
  if (block.data == nullptr) block = allocate(plan.bytes() + 1);
  data_ = block.data;
  bytes_ = block.bytes;
}

Scratch::~Scratch() { std::free(keep({data_, bytes_}).data); }

void advise_large_pages(void* data, size_t bytes) {
#ifdef __linux__
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace libmoe_fast
