// The CPU ops: token permutation, and the experts between.
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

// The experts (experts.h) on tokens x [T, D] with gate weights [T, K] -> y [T, O] and, if keep_z, the pre-activation
// z [T*K, H], gated [T*K, 2H], else [0, .]. w1 [N, H, D], gated [N, 2H, D]; b1 [N, H or 2H]; w2 [N, O, H]; b2 [N, O].
std::tuple<Tensor, Tensor> grouped_mlp(const Tensor& x, const Tensor& weights, const Tensor& order,
                                       const Tensor& inverse, const Tensor& offsets, const Tensor& w1,
                                       const std::optional<Tensor>& b1, const Tensor& w2,
                                       const std::optional<Tensor>& b2, const std::string& activation, bool gated,
                                       bool keep_z);

// dy [T, O] -> [dx, dweights], then, with weight_grads, dw1, dw2, and db1, db2 for the biases there are.
std::vector<Tensor> grouped_mlp_backward(const Tensor& dy, const Tensor& x, const Tensor& weights, const Tensor& order,
                                         const Tensor& inverse, const Tensor& offsets, const Tensor& w1,
                                         const std::optional<Tensor>& b1, const Tensor& w2,
                                         const std::optional<Tensor>& b2, const Tensor& z,
                                         const std::string& activation, bool gated, bool weight_grads);

}  // namespace libmoe_fast
