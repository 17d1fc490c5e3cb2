// Runs CUDA kernels on the CPU, for tests: put this folder before CUDA's headers and compile the .cu files as C++.
//
// One block runs at a time. Each of its threads is a fiber (a stack of its own, switched by hand) that runs until it
// reaches a barrier; __syncthreads waits for the block, every warp operation for the warp. LIBMOE_FAST_THREAD_ORDER
// (forward, backward, shuffled) sets the order of the fibers between two barriers, and of the blocks: a kernel whose
// result changes with it has a race. Address sanitizer knows about the fibers and about the end of a block's shared
// memory.
//
// It has what the kernels here use: one-dimensional blocks, dynamic shared memory (static would silently be a local
// variable), full-mask warp operations. A block's threads must be a multiple of 32.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a kernel sees; set whenever a fiber is entered.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // what a launch may ask for without further ado
constexpr unsigned kWarp = 32;

enum class Waiting { kNot, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Waiting waiting = Waiting::kNot;
  const char* at = "";       // the operation it waits in
  uint64_t exchanged = 0;    // its value in a warp operation
  void* fake_stack = nullptr;  // of address sanitizer
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  unsigned thread = 0;  // the one that runs
};

inline Block block;

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "CUDA emulation: block %u: %s\n", blockIdx.x, message.c_str());
  std::exit(3);
}

inline Fiber& current() { return block.fibers[block.thread]; }

// From a fiber to the scheduler. `last`: the fiber never runs again.
inline void leave(bool last) {
  Fiber& fiber = current();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  block.kernel();
  current().waiting = Waiting::kDone;
  leave(true);
}

// From the scheduler to a fiber, until it waits or is done.
inline void enter(unsigned thread) {
  block.thread = thread;
  threadIdx = dim3(thread, 0, 0);
  Fiber& fiber = current();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack.data(), kStackBytes);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void wait(Waiting for_whom, const char* at) {
  current().waiting = for_whom;
  current().at = at;
  leave(false);
}

// If all live threads of [begin, end) wait for `kind`, in the same operation, lets them go on.
inline bool release(Waiting kind, unsigned begin, unsigned end) {
  const char* at = nullptr;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& fiber = block.fibers[i];
    if (fiber.waiting == Waiting::kDone) continue;
    if (fiber.waiting != kind) return false;
    if (at != nullptr && std::strcmp(at, fiber.at) != 0) {
      fail(std::string("threads of one warp or block meet in ") + at + " and in " + fiber.at);
    }
    at = fiber.at;
  }
  if (at == nullptr) return false;
  for (unsigned i = begin; i < end; ++i) {
    if (block.fibers[i].waiting == kind) block.fibers[i].waiting = Waiting::kNot;
  }
  return true;
}

inline bool all_done() {
  for (const Fiber& fiber : block.fibers) {
    if (fiber.waiting != Waiting::kDone) return false;
  }
  return true;
}

inline std::vector<unsigned> thread_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  const char* name = std::getenv("LIBMOE_FAST_THREAD_ORDER");
  const std::string asked = name == nullptr ? "forward" : name;
  if (asked == "backward") {
    std::reverse(order.begin(), order.end());
  } else if (asked == "shuffled") {
    std::shuffle(order.begin(), order.end(), std::mt19937(count));
  } else if (asked != "forward") {
    fail("LIBMOE_FAST_THREAD_ORDER is " + asked + "; expected forward, backward or shuffled");
  }
  return order;
}

inline void start_fibers() {
  for (Fiber& fiber : block.fibers) {
    fiber.waiting = Waiting::kNot;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

inline void run_block(const std::vector<unsigned>& order) {
  start_fibers();
  const unsigned threads = blockDim.x;
  while (true) {
    for (unsigned thread : order) {
      if (block.fibers[thread].waiting == Waiting::kNot) enter(thread);
    }
    if (all_done()) return;
    bool released = false;
    for (unsigned warp = 0; warp < threads; warp += kWarp) released |= release(Waiting::kWarp, warp, warp + kWarp);
    if (!released && !release(Waiting::kBlock, 0, threads)) fail("deadlock: threads wait at different barriers");
  }
}

}  // namespace emulation

// What `extern __shared__ unsigned char libmoe_fast_shared[]` in the kernels means here.
alignas(16) inline unsigned char libmoe_fast_shared[emulation::kSharedBytes];

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  using namespace emulation;
  const dim3 grid = config->gridDim, threads = config->blockDim;
  const bool valid = grid.x > 0 && grid.y > 0 && grid.y <= 65535 && grid.z == 1 && threads.x > 0 &&
                     threads.x <= 1024 && threads.x % kWarp == 0 && threads.y == 1 && threads.z == 1 &&
                     config->dynamicSmemBytes <= kSharedBytes;
  if (!valid) return cudaErrorInvalidConfiguration;
  block.kernel = [&] { kernel(arguments...); };
  gridDim = grid;
  blockDim = threads;
  block.fibers.resize(threads.x);
  const std::vector<unsigned> fibers = thread_order(threads.x), columns = thread_order(grid.x);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x : columns) {
      blockIdx = dim3(x, y, 0);
      std::memset(libmoe_fast_shared, 0xA5, kSharedBytes);  // shared memory starts with garbage
#if defined(__SANITIZE_ADDRESS__)
      ASAN_POISON_MEMORY_REGION(libmoe_fast_shared + config->dynamicSmemBytes,
                                kSharedBytes - config->dynamicSmemBytes);
#endif
      run_block(fibers);
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(libmoe_fast_shared, kSharedBytes);
#endif
    }
  }
  return cudaSuccess;
}

// What a kernel calls -------------------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::wait(emulation::Waiting::kBlock, "__syncthreads"); }

namespace emulation {

// Every lane gives a value, then every lane computes a result from the warp's values.
template <typename T, typename Result>
auto exchange(unsigned mask, T value, const char* operation, const Result& result) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (mask != 0xffffffffu) fail(std::string(operation) + ": only full masks are emulated");
  std::memcpy(&current().exchanged, &value, sizeof(T));
  wait(Waiting::kWarp, operation);
  const unsigned first = block.thread / kWarp * kWarp;
  const auto value_of = [&](unsigned lane) {
    const Fiber& fiber = block.fibers[first + lane];
    if (fiber.waiting == Waiting::kDone) fail(std::string(operation) + ": a lane of the warp has ended");
    T other;
    std::memcpy(&other, &fiber.exchanged, sizeof(T));
    return other;
  };
  const auto computed = result(value_of, block.thread - first);
  wait(Waiting::kWarp, operation);  // nobody gives its next value before all have read this one
  return computed;
}

}  // namespace emulation

inline void __syncwarp(unsigned = 0xffffffffu) { emulation::wait(emulation::Waiting::kWarp, "__syncwarp"); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::exchange(mask, value, "__shfl_sync", [&](const auto& of, unsigned) { return of(source % 32); });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return emulation::exchange(mask, value, "__shfl_up_sync", [&](const auto& of, unsigned lane) {
    return of(lane >= distance ? lane - distance : lane);
  });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return emulation::exchange(mask, value, "__shfl_xor_sync",
                             [&](const auto& of, unsigned lane) { return of(lane ^ bits); });
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return emulation::exchange(mask, value, "__match_any_sync", [&](const auto& of, unsigned) {
    unsigned peers = 0;
    for (unsigned lane = 0; lane < 32; ++lane) peers |= of(lane) == value ? 1u << lane : 0u;
    return peers;
  });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Fibers are never interrupted, so that nothing comes between the read and the write.
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
