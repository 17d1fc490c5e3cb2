// The token permutation around the expert GEMMs, for the CPU.
//
// T tokens choose K of N experts each; the T*K choices are numbered t*K + k ("flat id") and sorted by expert.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

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

}  // namespace libmoe_fast
