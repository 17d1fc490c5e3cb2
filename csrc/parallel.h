// Threads come from torch's own OpenMP pool: torch.set_num_threads and OMP_NUM_THREADS hold here too, a second OpenMP
// runtime never meets torch's in one process, and building needs no OpenMP of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace libmoe_fast {

// Elements below which a further thread costs more than it saves (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainElements = 32768;

// Calls body(begin, end) over contiguous ranges of [0, rows), in parallel when rows * width is worth it. body must not
// throw: an exception cannot leave an OpenMP region.
template <typename Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, body);
}

}  // namespace libmoe_fast
