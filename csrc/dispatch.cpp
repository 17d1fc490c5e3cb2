// cpu_dispatch and cpu_dispatch_backward: arguments checked, results allocated, routing, losses and permutation run.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "permute.h"
#include "router_spec.h"
#include "routing.h"
#include "rows.h"
#include "scratch.h"
#include "tensors.h"

namespace libmoe_fast {

namespace {

using Optional = std::optional<Tensor>;

// Contiguous, in `dtype`. The router's tensors are small: converting them takes less than to look up who could.
Tensor converted(const Tensor& tensor, ScalarType dtype) {
  const Tensor given = as_contiguous(tensor);
  if (given.scalar_type() == dtype) return given;
  Tensor result = new_tensor(given.sizes().vec(), dtype);
  dispatch_row_dtype(given.scalar_type(), [&]<typename From>() {
    dispatch_row_dtype(dtype, [&]<typename To>() {
      convert_row(result.mutable_data_ptr<To>(), given.const_data_ptr<From>(), given.numel());
    });
  });
  return result;
}

// The router's tensors, checked, in the dtype that routing computes in; held as long as pointers into them are used.
class RouterTensors {
 public:
  RouterTensors(const ArgumentCheck& check, const RouterSpec& spec, const Tensor& x, const Tensor& weight,
                const Optional& bias, const Optional& noise, const Optional& noise_weight,
                const Optional& learned_temperature, double temperature)
      : temperature_(temperature) {
    check.shape(x, "x", "[T, D]", {-1, -1});
    check.floating(x, "x");
    check.between(x.size(1), "D", 1, INT64_MAX);
    real_ = accumulator_dtype(x.scalar_type());
    x_ = as_contiguous(x);
    weight_ = real(check, weight, "weight", "[N, D]", {spec.experts, x.size(1)});
    const bool has_bias = spec.bias != RouterSpec::Bias::kNone;
    if (has_bias != bias.has_value()) check.fail("expected ", has_bias ? "a" : "no", " `bias`, as `spec` says");
    if (has_bias) bias_ = real(check, *bias, "bias", "[N]", {spec.experts});
    if (noise.has_value()) noise_ = real(check, *noise, "noise", "[T, N]", {x.size(0), spec.experts});
    if (noise.has_value() && spec.noise == RouterSpec::Noise::kLearned) {
      if (!noise_weight.has_value()) check.fail("expected a `noise_weight`, as `spec` says");
      noise_weight_ = real(check, *noise_weight, "noise_weight", "[N, D]", {spec.experts, x.size(1)});
    }
    if (learned_temperature.has_value()) {
      learned_temperature_ = real(check, *learned_temperature, "learned_temperature", "[]", {});
    }
  }

  ScalarType real() const { return real_; }

  template <typename T>
  RouterInputs<T> inputs(int64_t sequences) const {
    using Real = Accumulator<T>;
    const auto pointer = [](const Optional& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<Real>() : nullptr;
    };
    return {.tokens = x_->size(0),
            .width = x_->size(1),
            .sequences = sequences,
            .x = x_->const_data_ptr<T>(),
            .weight = pointer(weight_),
            .bias = pointer(bias_),
            .noise = pointer(noise_),
            .noise_weight = pointer(noise_weight_),
            .temperature = learned_temperature_.has_value() ? *pointer(learned_temperature_)
                                                            : static_cast<Real>(temperature_)};
  }

 private:
  Tensor real(const ArgumentCheck& check, const Tensor& tensor, const char* name, const char* letters,
              std::initializer_list<int64_t> sizes) const {
    check.shape(tensor, name, letters, sizes);
    check.floating(tensor, name);
    return converted(tensor, real_);
  }

  double temperature_;
  ScalarType real_;
  Optional x_, weight_, bias_, noise_, noise_weight_, learned_temperature_;
};

// The tensors of Routed, in the order in which the op returns them; those that the spec has no use for are absent.
class RoutedTensors {
 public:
  static constexpr int kIndex = 0, kWeights = 1, kProbs = 2, kLogits = 3, kXNorm = 4, kWNorm = 5, kCosines = 6,
                       kNoiseScale = 7, kCount = 8;

  // New ones, for T tokens like x.
  RoutedTensors(const RouterSpec& spec, const Tensor& x, bool noisy) : present_(present(spec, noisy)) {
    const int64_t T = x.size(0), N = spec.experts, K = spec.top_k;
    const ScalarType real = accumulator_dtype(x.scalar_type());
    const std::vector<std::vector<int64_t>> sizes{{T, K}, {T, K}, {T, N}, {T, N}, {T}, {N}, {T, N}, {T, N}};
    for (int i = 0; i < kCount; ++i) {
      if (present_[i]) tensors_.push_back(new_tensor(sizes[i], i == kIndex ? ScalarType::Long : real));
    }
  }

  // Those that forward returned.
  RoutedTensors(const ArgumentCheck& check, const RouterSpec& spec, const Tensor& x, bool noisy,
                const std::vector<Tensor>& given)
      : tensors_(given), present_(present(spec, noisy)) {
    const int64_t T = x.size(0), N = spec.experts, K = spec.top_k;
    const auto expected = static_cast<size_t>(std::count(present_.begin(), present_.end(), true));
    if (given.size() != expected) check.fail("expected `routed` with ", expected, " tensors, got ", given.size());
    check.shape(given[kIndex], "routed[0]", "[T, K]", {T, K});
    check.int64(given[kIndex], "routed[0]");
    const std::vector<int64_t> numel{T * K, T * K, T * N, T * N, T, N, T * N, T * N};
    size_t place = 0;
    for (int i = 0; i < kCount; ++i) {
      if (!present_[i]) continue;
      const Tensor& tensor = given[place++];
      const ScalarType dtype = i == kIndex ? ScalarType::Long : accumulator_dtype(x.scalar_type());
      if (tensor.numel() != numel[i] || tensor.scalar_type() != dtype || !tensor.is_contiguous()) {
        check.fail("expected `routed` as forward returned it, got another tensor at ", place - 1);
      }
    }
    check.entries(given[kIndex], "routed[0]", N);
  }

  const std::vector<Tensor>& tensors() const { return tensors_; }

  template <typename Real>
  Routed<Real> pointers() const {
    int place = 0;
    const auto next = [&](int i) -> Real* {
      return present_[i] ? const_cast<Tensor&>(tensors_[place++]).mutable_data_ptr<std::remove_const_t<Real>>() : nullptr;
    };
    auto* index = const_cast<Tensor&>(tensors_[place++]).mutable_data_ptr<int64_t>();
    Routed<Real> routed{.index = index};
    routed.weights = next(kWeights);
    routed.probs = next(kProbs);
    routed.logits = next(kLogits);
    routed.x_norm = next(kXNorm);
    routed.w_norm = next(kWNorm);
    routed.cosines = next(kCosines);
    routed.noise_scale = next(kNoiseScale);
    return routed;
  }

 private:
  static std::vector<bool> present(const RouterSpec& spec, bool noisy) {
    const bool cosine = spec.cosine(), learned = noisy && spec.noise == RouterSpec::Noise::kLearned;
    return {true, true, true, true, cosine, cosine, cosine, learned};
  }

  std::vector<Tensor> tensors_;
  std::vector<bool> present_;
};

void check_sequences(const ArgumentCheck& check, int64_t sequences, int64_t tokens) {
  check.between(sequences, "sequences", 1, INT32_MAX);
  if (tokens % sequences != 0) check.fail("expected `sequences` to divide T = ", tokens, ", got ", sequences);
}

// [rows, width] without memory: one zero, seen everywhere.
Tensor virtual_rows(const Tensor& x, int64_t rows) {
  const std::vector<int64_t> sizes{rows, x.size(1)}, strides{0, 0};
  return torch::stable::from_blob(std::calloc(1, sizeof(double)), sizes, strides, x.device(), x.scalar_type(),
                                  &std::free);
}

// The end of the loss sums: losses [3] (aux, balance, z), share [N] of the choices, first_share [S, N], which is f.
template <typename Real>
void finish_losses(const RouterSpec& spec, const LossSums<Real>& sums, const TokenBlocks& blocks, int64_t sequences,
                   bool over_topk, double balance_coef, double z_coef, const int64_t* offsets, Real* losses,
                   Real* share, Real* first_share) {
  const int64_t N = spec.experts, length = std::max<int64_t>(1, blocks.length);
  const int64_t choices = std::max<int64_t>(1, offsets[N]), counted = length * (over_topk ? spec.top_k : 1);
  for (int64_t n = 0; n < N; ++n) {
    share[n] = static_cast<Real>(offsets[n + 1] - offsets[n]) / static_cast<Real>(choices);
  }
  Real balance = 0, z = 0;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    for (int64_t n = 0; n < N; ++n) {
      int64_t hits = 0;
      Real probs = 0;
      for (int64_t b = sequence * blocks.per_sequence; b < (sequence + 1) * blocks.per_sequence; ++b) {
        hits += sums.counted[b * N + n];
        probs += sums.probs[b * N + n];
      }
      const Real f = static_cast<Real>(hits) / static_cast<Real>(counted);
      first_share[sequence * N + n] = f;
      balance += f * (probs / static_cast<Real>(length));
    }
  }
  for (const Real square : sums.squares) z += square;
  balance *= static_cast<Real>(N) / static_cast<Real>(sequences);
  z /= static_cast<Real>(length * sequences);
  losses[0] = static_cast<Real>(balance_coef) * balance + static_cast<Real>(z_coef) * z;
  losses[1] = balance;
  losses[2] = z;
}

}  // namespace

std::vector<Tensor> cpu_dispatch(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& noise,
                                 const Optional& noise_weight, const Optional& learned_temperature,
                                 const Optional& /*aux_scale*/, double temperature, const std::string& encoded_spec,
                                 int64_t sequences, bool over_topk, double balance_coef, double z_coef) {
  const ArgumentCheck check("cpu_dispatch");
  const RouterSpec& spec = RouterSpec::decode(check, encoded_spec);
  const RouterTensors router(check, spec, x, weight, bias, noise, noise_weight, learned_temperature, temperature);
  check_sequences(check, sequences, x.size(0));
  const int64_t choices = x.size(0) * spec.top_k, N = spec.experts;
  const RoutedTensors routed(spec, x, noise.has_value());
  const auto integers = [&](int64_t size) { return new_tensor({size}, ScalarType::Long); };
  Tensor order = integers(choices), inverse = integers(choices), offsets = integers(N + 1);
  Tensor losses = new_tensor({3}, router.real());
  Tensor share = new_tensor({N}, router.real());
  Tensor first_share = new_tensor({sequences, N}, router.real());
  dispatch_row_dtype(x.scalar_type(), [&]<typename T>() {
    using Real = Accumulator<T>;
    const RouterInputs<T> inputs = router.inputs<T>(sequences);
    const Routed<Real> results = routed.pointers<Real>();
    const LossSums<Real> sums = route_tokens<T>(spec, inputs, over_topk, results);
    sort_choices(results.index, choices, N, order.mutable_data_ptr<int64_t>(), inverse.mutable_data_ptr<int64_t>(),
                 offsets.mutable_data_ptr<int64_t>());
    finish_losses<Real>(spec, sums, TokenBlocks(inputs.tokens, sequences), sequences, over_topk, balance_coef, z_coef,
                        offsets.const_data_ptr<int64_t>(), losses.mutable_data_ptr<Real>(),
                        share.mutable_data_ptr<Real>(), first_share.mutable_data_ptr<Real>());
  });
  std::vector<Tensor> outputs{virtual_rows(x, choices)};
  outputs.insert(outputs.end(), routed.tensors().begin(), routed.tensors().end());
  outputs.insert(outputs.end(), {order, inverse, offsets, losses, share, first_share});
  return outputs;
}

std::vector<Tensor> cpu_dispatch_backward(const Optional& drows, const Tensor& dweights, const Optional& dlosses,
                                          const Tensor& x, const Tensor& weight, const Optional& bias,
                                          const Optional& noise, const Optional& noise_weight,
                                          const Optional& learned_temperature, const Optional& aux_scale,
                                          const std::vector<Tensor>& routed, const Tensor& inverse,
                                          const Tensor& first_share, double temperature,
                                          const std::string& encoded_spec, double balance_coef, double z_coef) {
  const ArgumentCheck check("cpu_dispatch_backward");
  const RouterSpec& spec = RouterSpec::decode(check, encoded_spec);
  const RouterTensors router(check, spec, x, weight, bias, noise, noise_weight, learned_temperature, temperature);
  const RoutedTensors kept(check, spec, x, noise.has_value(), routed);
  const int64_t tokens = x.size(0), choices = tokens * spec.top_k;
  const auto real = [&](const Tensor& tensor) { return converted(tensor, router.real()); };
  check.shape(first_share, "first_share", "[sequences, N]", {-1, spec.experts});
  check.floating(first_share, "first_share");
  const int64_t sequences = first_share.size(0);
  check_sequences(check, sequences, tokens);
  check.shape(dweights, "dweights", "[T, K]", {tokens, spec.top_k});
  check.floating(dweights, "dweights");
  check.shape(inverse, "inverse", "[T*K]", {choices});
  check.int64(inverse, "inverse");
  const Tensor places = as_contiguous(inverse);
  check.entries(places, "inverse", choices);
  Optional dxs, loss_gradients, scale;
  if (drows.has_value()) {
    check.shape(*drows, "drows", "[T*K, D]", {choices, x.size(1)});
    check.same_dtype(*drows, "drows", x, "x");
    dxs = as_contiguous(*drows);
  }
  if (dlosses.has_value()) {
    check.shape(*dlosses, "dlosses", "[3]", {3});
    check.floating(*dlosses, "dlosses");
    loss_gradients = real(*dlosses);
  }
  if (aux_scale.has_value()) {
    check.shape(*aux_scale, "aux_scale", "[]", {});
    check.floating(*aux_scale, "aux_scale");
    scale = real(*aux_scale);
  }
  const Tensor gate_gradients = real(dweights), share = real(first_share);

  Tensor dx = new_tensor({tokens, x.size(1)}, x.scalar_type());
  const auto gradient = [&](const std::vector<int64_t>& sizes) { return new_tensor(sizes, router.real()); };
  const bool learned_noise = noise.has_value() && spec.noise == RouterSpec::Noise::kLearned;
  Tensor dweight = gradient({weight.size(0), weight.size(1)});
  Optional dbias, dnoise_weight, dtemperature;
  if (bias.has_value()) dbias = gradient({spec.experts});
  if (learned_noise) dnoise_weight = gradient({weight.size(0), weight.size(1)});
  if (learned_temperature.has_value()) dtemperature = gradient({});
  dispatch_row_dtype(x.scalar_type(), [&]<typename T>() {
    using Real = Accumulator<T>;
    const auto pointer = [](Optional& tensor) {
      return tensor.has_value() ? tensor->mutable_data_ptr<Real>() : nullptr;
    };
    const Real attached = scale.has_value() ? *scale->const_data_ptr<Real>() : Real(0);
    const Real* given = loss_gradients.has_value() ? loss_gradients->const_data_ptr<Real>() : nullptr;
    const Real aux = attached + (given == nullptr ? Real(0) : given[0]);
    const RoutingUpstream<T> upstream{
        .dxs = dxs.has_value() ? dxs->const_data_ptr<T>() : nullptr,
        .inverse = places.const_data_ptr<int64_t>(),
        .dweights = gate_gradients.const_data_ptr<Real>(),
        .share = share.const_data_ptr<Real>(),
        .has_aux = scale.has_value() || given != nullptr,
        .balance = aux * static_cast<Real>(balance_coef) + (given == nullptr ? Real(0) : given[1]),
        .z = aux * static_cast<Real>(z_coef) + (given == nullptr ? Real(0) : given[2])};
    const RoutingGradients<T> gradients{.dx = dx.mutable_data_ptr<T>(),
                                        .dweight = dweight.mutable_data_ptr<Real>(),
                                        .dbias = pointer(dbias),
                                        .dnoise_weight = pointer(dnoise_weight),
                                        .dtemperature = pointer(dtemperature)};
    const RouterInputs<T> inputs = router.inputs<T>(sequences);
    route_tokens_backward<T>(spec, inputs, kept.pointers<const Real>(), upstream, gradients);
  });
  std::vector<Tensor> results{dx, converted(dweight, weight.scalar_type())};
  if (dbias) results.push_back(converted(*dbias, bias->scalar_type()));
  if (dnoise_weight) results.push_back(converted(*dnoise_weight, noise_weight->scalar_type()));
  if (dtemperature) results.push_back(converted(*dtemperature, learned_temperature->scalar_type()));
  return results;
}

}  // namespace libmoe_fast
