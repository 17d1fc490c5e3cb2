// Launches of permute_index.
#include <string_view>

#include "launchers.h"
#include "permute.cuh"

namespace libmoe_fast::cuda {

int64_t permute_index_scratch(int64_t choices, int64_t num_experts) {
  return (num_experts + 1) * (Slices(choices).count + 1);  // the slices' counts, and the totals
}

const char* permute_index(const int64_t* index, int64_t choices, int64_t num_experts, int64_t* scratch, int64_t* order,
                          int64_t* inverse, int64_t* offsets, void* stream) {
  const Slices slices(choices);
  const int experts = static_cast<int>(num_experts), buckets = experts + 1;
  int64_t* const counts = scratch;                          // [N+1, slices]
  int64_t* const totals = scratch + buckets * slices.count;  // [N+1]
  const unsigned blocks = static_cast<unsigned>(slices.count);

  const char* error =
      launch(count_choices, blocks, count_choices_shared(experts), stream, index, slices, experts, counts);
  if (error != nullptr) return error;
  error = launch(sum_slices, ceil_div(buckets, kWarps), 0, stream, counts, slices.count, buckets, totals);
  if (error != nullptr) return error;
  return launch(place_choices, blocks, place_choices_shared(experts), stream, index, slices, experts, counts, totals,
                order, inverse, offsets);
}

}  // namespace libmoe_fast::cuda

// Shared memory is sized at the launch, so that the compiled kernels do not tell: libmoe_fast/kernels/cuda_library.py
// asks here.
extern "C" __attribute__((used, visibility("default"))) int64_t libmoe_fast_shared_bytes(const char* kernel,
                                                                                        int64_t num_experts) {
  const std::string_view name = kernel;
  const int experts = static_cast<int>(num_experts);
  if (name == "count_choices") return libmoe_fast::cuda::count_choices_shared(experts);
  return name == "place_choices" ? libmoe_fast::cuda::place_choices_shared(experts) : 0;
}
