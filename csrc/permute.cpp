#include "permute.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "tensors.h"

namespace libmoe_fast {

namespace {

// Choices per slice below which another slice's histogram does not pay.
constexpr int64_t kSliceChoices = 8192;

// The choices in contiguous slices, one histogram row per slice. The number of slices changes nothing but the speed: a
// slice's first place for an expert follows all places of earlier slices, so the result is the one stable order.
struct Slices {
  int64_t choices, count, length;

  explicit Slices(int64_t total)
      : choices(total),
        count(std::clamp<int64_t>(total / kSliceChoices, 1, torch::stable::get_num_threads())),
        length((total + count - 1) / count) {}

  int64_t begin(int64_t slice) const { return std::min(choices, slice * length); }
  int64_t end(int64_t slice) const { return std::min(choices, (slice + 1) * length); }
};

template <typename Body>
void for_each_slice(const Slices& slices, const Body& body) {
  torch::stable::parallel_for(0, slices.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) body(slice);
  });
}

// counts[slice * N + e] = choices of expert e in the slice
void count_choices(const int64_t* experts, const Slices& slices, int64_t num_experts, std::vector<int64_t>& counts) {
  for_each_slice(slices, [&](int64_t slice) {
    int64_t* count = counts.data() + slice * num_experts;
    for (int64_t i = slices.begin(slice); i < slices.end(slice); ++i) ++count[experts[i]];
  });
}

// Turns counts into the first place of each (slice, expert), and writes where each expert's rows begin and end.
void counts_to_places(const Slices& slices, int64_t num_experts, std::vector<int64_t>& counts, int64_t* offsets) {
  int64_t place = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    offsets[expert] = place;
    for (int64_t slice = 0; slice < slices.count; ++slice) {
      int64_t& entry = counts[slice * num_experts + expert];
      const int64_t count = entry;
      entry = place;
      place += count;
    }
  }
  offsets[num_experts] = place;
}

void place_choices(const int64_t* experts, const Slices& slices, int64_t num_experts, std::vector<int64_t>& places,
                   int64_t* order, int64_t* inverse) {
  for_each_slice(slices, [&](int64_t slice) {
    int64_t* place = places.data() + slice * num_experts;
    for (int64_t i = slices.begin(slice); i < slices.end(slice); ++i) {
      const int64_t position = place[experts[i]]++;
      order[position] = i;
      inverse[i] = position;
    }
  });
}

}  // namespace

void sort_choices(const int64_t* experts, int64_t choices, int64_t num_experts, int64_t* order, int64_t* inverse,
                  int64_t* offsets) {
  const Slices slices(choices);
  std::vector<int64_t> counts(slices.count * num_experts, 0);
  count_choices(experts, slices, num_experts, counts);
  counts_to_places(slices, num_experts, counts, offsets);
  place_choices(experts, slices, num_experts, counts, order, inverse);
}

std::tuple<Tensor, Tensor, Tensor> permute_index(const Tensor& index, int64_t num_experts) {
  const ArgumentCheck check("permute_index");
  check.between(num_experts, "num_experts", 1, INT32_MAX);
  check.shape(index, "index", "[T, K]", {-1, -1});
  check.int64(index, "index");
  const Tensor experts = as_contiguous(index);
  check.entries(experts, "index", num_experts);

  const int64_t choices = experts.numel();
  Tensor order = new_tensor({choices}, ScalarType::Long);    // [T*K]
  Tensor inverse = new_tensor({choices}, ScalarType::Long);  // [T*K]
  Tensor offsets = new_tensor({num_experts + 1}, ScalarType::Long);  // [N+1]
  sort_choices(experts.const_data_ptr<int64_t>(), choices, num_experts, order.mutable_data_ptr<int64_t>(),
               inverse.mutable_data_ptr<int64_t>(), offsets.mutable_data_ptr<int64_t>());
  return {order, inverse, offsets};
}

}  // namespace libmoe_fast
