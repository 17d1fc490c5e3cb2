// Stands in for CUDA's header in the emulation: torch's header-only type rounds the same way, to nearest even.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
