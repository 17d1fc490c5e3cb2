// The activations and their slopes, vectorised, as exact as fp32 allows.
#pragma once

#include <cstdint>
#include <string>

namespace libmoe_fast {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu, kGptOss };

// kGptOss: gates are cut off above it, and what they multiply is 1 + up, with up cut off on both sides.
template <typename Real>
constexpr Real kGptOssLimit = Real(7);

// False if there is no such activation; the names are those of reference.ACTIVATIONS.
bool find_activation(const std::string& name, Activation& found);

// values = act(values)
template <typename Real>
void activate(Activation activation, Real* values, int64_t count);

// slopes = act'(values), values = act(values)
template <typename Real>
void activate_with_slopes(Activation activation, Real* values, Real* slopes, int64_t count);

}  // namespace libmoe_fast
