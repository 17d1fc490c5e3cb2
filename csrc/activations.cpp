#include "activations.h"

#include <cmath>
#include <cstring>

#include "rows.h"

// Fused multiply-adds halve the polynomials. Bits may then differ between machines, as those of the GEMMs around do.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace libmoe_fast {

namespace {

// Inlined into every instruction set's version of the loops below.
#define LIBMOE_FAST_INLINE inline __attribute__((always_inline))

// e^x for x <= 0, e^-87 below -87: within 1 unit in the last place, no branches, no table.
LIBMOE_FAST_INLINE float exponential(float x) {
  // Floats below zero are ordered like their bits. A comparison of floats here would be compiled to three masks.
  constexpr uint32_t kLeast = 0xc2ae0000;  // -87
  uint32_t least;
  std::memcpy(&least, &x, sizeof least);
  least = least < kLeast ? least : kLeast;
  std::memcpy(&x, &least, sizeof x);
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low mantissa bits
  const float shifted = x * 1.44269504f + kRoundToInteger;
  const float n = shifted - kRoundToInteger;
  // ln 2 in two parts, so that n ln 2 loses nothing.
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.3814611e-3f;  // minimax for (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, relative error of e^r 3e-9
  p = p * r + 8.368710e-3f;
  p = p * r + 4.16683874e-2f;
  p = p * r + 1.66665207e-1f;
  p = p * r + 4.99999935e-1f;
  p = (p * r) * r + r + 1.0f;
  int32_t bits, exponent;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23);
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

LIBMOE_FAST_INLINE double exponential(double x) { return std::exp(x); }

// sigmoid(x), and 1 - sigmoid(x) without its cancellation
template <typename Real>
LIBMOE_FAST_INLINE Real sigmoid(Real x, Real& complement) {
  const Real e = exponential(x < Real(0) ? x : -x);
  const Real larger = Real(1) / (Real(1) + e), smaller = e * larger;
  complement = x < Real(0) ? larger : smaller;
  return x < Real(0) ? smaller : larger;
}

// Phi(z) and phi(z) of the normal distribution. For z <= 0, Phi = e^(-z^2/2) q(t) with t = 1 / (1 + 0.34 |z|) and q a
// minimax polynomial (relative error 3e-8): the tail keeps its relative accuracy, which (1 + erf) / 2 loses.
LIBMOE_FAST_INLINE void normal(float z, float& cumulative, float& density) {
  const float size = z < 0.0f ? -z : z;
  const float bell = exponential(-0.5f * z * z);
  const float t = 1.0f / (1.0f + 0.34f * size);
  float q = -0.026120489f;
  q = q * t + 0.13949956f;
  q = q * t + -0.27313286f;
  q = q * t + 0.2021828f;
  q = q * t + -0.04471853f;
  q = q * t + 0.115359195f;
  q = q * t + 0.11519765f;
  q = q * t + 0.1361122f;
  q = q * t + 0.1356205f;
  const float tail = bell * (q * t);
  cumulative = z > 0.0f ? 1.0f - tail : tail;
  density = bell * 0.39894228f;
}

LIBMOE_FAST_INLINE void normal(double z, double& cumulative, double& density) {
  cumulative = 0.5 * std::erfc(-z * 0.70710678118654752440);
  density = std::exp(-0.5 * z * z) * 0.39894228040143267794;
}

template <Activation kind, typename Real>
LIBMOE_FAST_INLINE void evaluate(Real z, Real& value, Real& slope) {
  if constexpr (kind == Activation::kGelu) {
    Real cumulative, density;
    normal(z, cumulative, density);
    value = z * cumulative;
    slope = cumulative + z * density;
  } else if constexpr (kind == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
    constexpr Real kTwice = Real(1.5957691216057308), kCubic = Real(0.044715);
    Real complement;
    const Real s = sigmoid(kTwice * (z + kCubic * z * z * z), complement);
    value = z * s;
    slope = s + value * complement * kTwice * (Real(1) + Real(3) * kCubic * z * z);
  } else if constexpr (kind == Activation::kRelu) {
    value = z <= Real(0) ? Real(0) : z;  // so NaN stays NaN
    slope = z <= Real(0) ? Real(0) : Real(1);
  } else {
    constexpr Real kScale = kind == Activation::kSilu ? Real(1) : Real(1.702);
    constexpr bool kCut = kind == Activation::kGptOss;
    const bool above = kCut && z > kGptOssLimit<Real>;
    if (kCut) z = above ? kGptOssLimit<Real> : z;
    Real complement;
    const Real s = sigmoid(kScale * z, complement);
    value = z * s;
    slope = above ? Real(0) : s + kScale * value * complement;
  }
}

}  // namespace

template <Activation kind, typename Real>
LIBMOE_FAST_ROW void activate_all(Real* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Real slope;
    evaluate<kind>(values[i], values[i], slope);
  }
}

template <Activation kind, typename Real>
LIBMOE_FAST_ROW void activate_all_with_slopes(Real* values, Real* __restrict__ slopes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) evaluate<kind>(values[i], values[i], slopes[i]);
}

namespace {

// body.operator()<activation>()
template <typename Body>
void dispatch_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kGelu: return body.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh: return body.template operator()<Activation::kGeluTanh>();
    case Activation::kQuickGelu: return body.template operator()<Activation::kQuickGelu>();
    case Activation::kRelu: return body.template operator()<Activation::kRelu>();
    case Activation::kSilu: return body.template operator()<Activation::kSilu>();
    case Activation::kGptOss: return body.template operator()<Activation::kGptOss>();
  }
}

}  // namespace

template <typename Real>
void activate(Activation activation, Real* values, int64_t count) {
  dispatch_activation(activation, [&]<Activation kind>() { activate_all<kind>(values, count); });
}

template <typename Real>
void activate_with_slopes(Activation activation, Real* values, Real* slopes, int64_t count) {
  dispatch_activation(activation, [&]<Activation kind>() { activate_all_with_slopes<kind>(values, slopes, count); });
}

template void activate(Activation, float*, int64_t);
template void activate(Activation, double*, int64_t);
template void activate_with_slopes(Activation, float*, float*, int64_t);
template void activate_with_slopes(Activation, double*, double*, int64_t);

bool find_activation(const std::string& name, Activation& found) {
  static constexpr struct {
    const char* name;
    Activation activation;
  } kNames[] = {{"gelu", Activation::kGelu},
                {"gelu_pytorch_tanh", Activation::kGeluTanh},
                {"quick_gelu", Activation::kQuickGelu},
                {"relu", Activation::kRelu},
                {"silu", Activation::kSilu},
                {"gpt_oss", Activation::kGptOss}};
  for (const auto& entry : kNames) {
    if (name == entry.name) {
      found = entry.activation;
      return true;
    }
  }
  return false;
}

}  // namespace libmoe_fast
