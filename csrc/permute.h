// A stable counting sort of the T*K expert choices.
#pragma once

#include <cstdint>

namespace libmoe_fast {

// experts [T*K] in [0, N) -> order, inverse [T*K] and offsets [N+1], as permute_index (ops.h) returns them.
void sort_choices(const int64_t* experts, int64_t choices, int64_t num_experts, int64_t* order, int64_t* inverse,
                  int64_t* offsets);

}  // namespace libmoe_fast
