// The CPU ops: token permutation, routing, and the experts.
//
// T tokens choose K of N experts each; the T*K choices are numbered t*K + k ("flat id") and sorted by expert.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace libmoe_fast {

using torch::stable::Tensor;

// index [T, K] int64 in [0, N) -> order [T*K] (sorted position -> flat id), inverse [T*K] (flat id -> sorted position)
// and offsets [N+1] (expert e owns sorted positions offsets[e] to offsets[e+1]), all int64. Ties keep their flat order.
std::tuple<Tensor, Tensor, Tensor> permute_index(const Tensor& index, int64_t num_experts);

// x [T, D], order [T*K] -> [T*K, D]: out[r] = x[order[r] / K], times weights.flat[order[r]] if weights [T, K] is given.
Tensor gather(const Tensor& x, const Tensor& order, int64_t top_k, const std::optional<Tensor>& weights);

// y [T*K, O], inverse [T*K] -> [T, O]: out[t] = sum over k, in that order, of weights[t, k] * y[inverse[t*K + k]];
// without weights they are 1.
Tensor weighted_scatter(const Tensor& y, const Tensor& inverse, int64_t top_k, const std::optional<Tensor>& weights);

// a [T*K, O], b [T, O], inverse [T*K] -> [T, K] in the accumulator's dtype: out[t, k] = <a[inverse[t*K + k]], b[t]>.
Tensor row_dot(const Tensor& a, const Tensor& b, const Tensor& inverse, int64_t top_k);

// Routing (routing.h), auxiliary losses and permutation of tokens x [T, D], as libmoe_fast/fused.py documents them:
// [rows, *Routed, order, inverse, offsets, losses, share, first_share].
std::vector<Tensor> cpu_dispatch(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& noise, const std::optional<Tensor>& noise_weight,
                                 const std::optional<Tensor>& learned_temperature,
                                 const std::optional<Tensor>& aux_scale, double temperature,
                                 const std::string& encoded_spec, int64_t sequences, bool over_topk,
                                 double balance_coef, double z_coef);

// [dx, dweight], then dbias, dnoise_weight, dtemperature for those there are.
std::vector<Tensor> cpu_dispatch_backward(
    const std::optional<Tensor>& drows, const Tensor& dweights, const std::optional<Tensor>& dlosses, const Tensor& x,
    const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& noise_weight, const std::optional<Tensor>& learned_temperature,
    const std::optional<Tensor>& aux_scale, const std::vector<Tensor>& routed, const Tensor& inverse,
    const Tensor& first_share, double temperature, const std::string& encoded_spec, double balance_coef, double z_coef);

// The experts (experts.h) on tokens x [T, D] with gate weights [T, K] -> y [T, O] and, if store_z, the pre-activation
// z [T*K, H], gated [T*K, 2H], else [0, .]. w1 [N, H, D], gated [N, 2H, D]; b1 [N, H or 2H]; w2 [N, O, H]; b2 [N, O].
// `rows` is there for autograd: it has the gradient that x would have. offsets [N+1], or longer: choices of what follows
// the N experts are run by none.
std::tuple<Tensor, Tensor> cpu_experts(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& weights,
                                       const Tensor& order, const Tensor& inverse, const Tensor& offsets,
                                       const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                                       const std::optional<Tensor>& b2, const std::string& activation, bool gated,
                                       bool store_z);

// dy [T, O] -> [dx [T, D], or drows [T*K, D] without sum_over_k; dweights; with weight_grads also dw1, db1, dw2, db2,
// those there are].
std::vector<Tensor> cpu_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& weights, const Tensor& order,
                                         const Tensor& inverse, const Tensor& offsets, const Tensor& w1,
                                         const std::optional<Tensor>& b1, const Tensor& w2,
                                         const std::optional<Tensor>& b2, const Tensor& z,
                                         const std::string& activation, bool gated, bool sum_over_k,
                                         bool weight_grads);

}  // namespace libmoe_fast
