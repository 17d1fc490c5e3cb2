// The five activations and their slopes, vectorised, as exact as fp32 allows.
#pragma once

#include <cstdint>
#include <string>

namespace libmoe_fast {

enum class Activation { kGelu, kGeluTanh, kQuickGelu, kRelu, kSilu };

// False if there is no such activation; the names are those of reference.ACTIVATIONS.
bool find_activation(const std::string& name, Activation& found);

// value = act(z)
template <typename Real>
void activate(Activation activation, const Real* z, Real* value, int64_t count);

// value = act(z), slope = act'(z)
template <typename Real>
void activate_with_slope(Activation activation, const Real* z, Real* value, Real* slope, int64_t count);

}  // namespace libmoe_fast
