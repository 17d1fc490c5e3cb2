// Routing, on plain memory: score -> probability p -> selection score s -> top-K of s -> gate weights, and back.
//
// Everything in Real, float32 or float64, whatever the tokens are: rounding never comes before a choice. What is summed
// over tokens is summed per block of tokens, and the blocks in order: the same bits for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "router_spec.h"

namespace libmoe_fast {

template <typename T>
struct RouterInputs {
  using Real = Accumulator<T>;
  int64_t tokens, width, sequences;  // T, D, S
  const T* x;                        // [T, D]
  const Real* weight;                // [N, D]
  const Real* bias;                  // [N], null without one
  const Real* noise;                 // [T, N], null without noise
  const Real* noise_weight;          // [N, D], null unless the noise is learned
  Real temperature;
};

// What routing keeps for backward; null where the spec has no use for it. Real may be const.
template <typename Real>
struct Routed {
  std::conditional_t<std::is_const_v<Real>, const int64_t, int64_t>* index;  // [T, K]
  Real* weights;          // [T, K]
  Real *probs, *logits;   // [T, N]
  Real *x_norm, *w_norm;  // [T], [N], tau included
  Real* cosines;          // [T, N]
  Real* noise_scale;      // [T, N]
};

// Blocks of tokens, none across two sequences.
struct TokenBlocks {
  static constexpr int64_t kTokens = 32;

  int64_t length, per_sequence, count;  // tokens of a sequence, blocks of a sequence, blocks

  TokenBlocks(int64_t tokens, int64_t sequences)
      : length(tokens / sequences),
        per_sequence((length + kTokens - 1) / kTokens),
        count(per_sequence * sequences) {}

  int64_t sequence(int64_t block) const { return block / per_sequence; }
  int64_t begin(int64_t block) const { return sequence(block) * length + block % per_sequence * kTokens; }
  int64_t end(int64_t block) const { return std::min(begin(block) + kTokens, (sequence(block) + 1) * length); }
};

// What the losses are made of, per block.
template <typename Real>
struct LossSums {
  std::vector<int64_t> counted;  // [blocks, N]: choices that the balance loss counts
  std::vector<Real> probs;       // [blocks, N]
  std::vector<Real> squares;     // [blocks]: of logsumexp(logits)
};

// Fills `routed`. over_topk: whether the balance loss counts all K choices, or the first.
template <typename T>
LossSums<Accumulator<T>> route_tokens(const RouterSpec& spec, const RouterInputs<T>& inputs, bool over_topk,
                                      const Routed<Accumulator<T>>& routed);

template <typename T>
struct RoutingUpstream {
  using Real = Accumulator<T>;
  const T* dxs;            // [T*K, D], the experts' gradient of their rows, or null
  const int64_t* inverse;  // [T*K], for dxs
  const Real* dweights;    // [T, K]
  const Real* share;       // [S, N]: f of the balance loss
  bool has_aux;            // whether there is a gradient of the auxiliary loss, and these
  Real balance, z;         // gradients of the balance loss and the z-loss
};

// Null for what the spec does not learn.
template <typename T>
struct RoutingGradients {
  using Real = Accumulator<T>;
  T* dx;                // [T, D]: the sum over K of dxs included
  Real* dweight;        // [N, D]
  Real* dbias;          // [N]
  Real* dnoise_weight;  // [N, D]
  Real* dtemperature;   // []
};

template <typename T>
void route_tokens_backward(const RouterSpec& spec, const RouterInputs<T>& inputs,
                           const Routed<const Accumulator<T>>& routed, const RoutingUpstream<T>& upstream,
                           const RoutingGradients<T>& gradients);

}  // namespace libmoe_fast
