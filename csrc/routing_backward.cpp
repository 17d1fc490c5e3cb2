// Routing, backward: from the gradients of gate weights and losses to those of x and of the router.
//
//   per token:        dweights, losses -> dp -> dlogits -> dscore -> dot' = the gradient by <x, w>
//                     dx = sum over K of dxs + dot' W (+ norm terms)
//   per 128 columns:  dW = dot'^T x
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "parallel.h"
#include "products.h"
#include "routing.h"

namespace libmoe_fast {

namespace {

constexpr int64_t kColumns = 128;          // of dW per task: the sums of a few experts stay in the first-level cache
constexpr int64_t kTokensPerSum = 512;     // sums of sums lose less than one long sum
constexpr double kShortestLength = 1e-12;  // below, the gradient of a norm counts as 0

template <typename T>
class RouterBackward {
 public:
  using Real = Accumulator<T>;

  RouterBackward(const RouterSpec& spec, const RouterInputs<T>& inputs, const Routed<const Real>& routed,
                 const RoutingUpstream<T>& upstream, const RoutingGradients<T>& gradients)
      : spec_(spec),
        in_(inputs),
        kept_(routed),
        up_(upstream),
        out_(gradients),
        blocks_(inputs.tokens, inputs.sequences),
        learned_noise_(inputs.noise != nullptr && inputs.noise_weight != nullptr),
        sides_(learned_noise_ ? 2 : 1),
        ddots_(inputs.tokens * sides_ * spec.experts),
        dbias_(blocks_.count * spec.experts),
        dw_norm_(spec.cosine() ? blocks_.count * spec.experts : 0),
        dtemperature_(blocks_.count) {}

  void run() {
    const int64_t N = spec_.experts, local_size = std::max(in_.width, 2 * N);
    std::vector<Real> locals(torch::stable::get_num_threads() * local_size);
    for_each_task(blocks_.count, [&](int64_t block, int64_t worker) {
      Real* local = locals.data() + worker * local_size;
      for (int64_t t = blocks_.begin(block); t < blocks_.end(block); ++t) {
        const Real along_x = token_gradients(t, block, local);
        token_dx(t, along_x, local);
      }
    });
    const std::vector<Real> along_w = along_weights();
    for_each_task((in_.width + kColumns - 1) / kColumns,
                  [&](int64_t task, int64_t) { weight_gradient(task * kColumns, along_w); });
    if (out_.dbias != nullptr) sum_blocks(dbias_, N, out_.dbias);
    if (out_.dtemperature != nullptr) sum_blocks(dtemperature_, 1, out_.dtemperature);
  }

 private:
  // ddot of token t, and that of the noise's weight behind it.
  Real* ddot(int64_t t) { return ddots_.data() + t * sides_ * spec_.experts; }

  // From the gate weights and the losses to ddot; returns the coefficient of x in dx. local: [2, N] used.
  Real token_gradients(int64_t t, int64_t block, Real* local) {
    const int64_t N = spec_.experts;
    const Real *p = kept_.probs + t * N, *logits = kept_.logits + t * N;
    Real *dp = local, *dlogits = local + N, *dscore = ddot(t);
    through_weights(t, block, p, dp);
    std::fill_n(dlogits, N, Real(0));
    if (up_.has_aux) through_losses(block, logits, dp, dlogits);
    if (spec_.softmax()) {
      through_softmax(block, logits, p, dp, dlogits);
    } else {
      for (int64_t n = 0; n < N; ++n) dlogits[n] += dp[n];
    }
    for (int64_t n = 0; n < N; ++n) {
      dscore[n] = spec_.sigmoid() ? dlogits[n] * logits[n] * (Real(1) - logits[n]) : dlogits[n];
    }
    if (spec_.bias == RouterSpec::Bias::kScore) {
      for (int64_t n = 0; n < N; ++n) dbias_[block * N + n] += dscore[n];
    }
    if (learned_noise_) {
      for (int64_t n = 0; n < N; ++n) {  // softplus' = 1 - exp(-softplus)
        dscore[N + n] = dscore[n] * in_.noise[t * N + n] * (Real(1) - std::exp(-kept_.noise_scale[t * N + n]));
      }
    }
    return spec_.cosine() ? through_cosine(t, block, dscore) : Real(0);
  }

  // To the chosen p, or s; zero elsewhere.
  void through_weights(int64_t t, int64_t block, const Real* p, Real* dp) {
    const int64_t N = spec_.experts, K = spec_.top_k;
    const int64_t* index = kept_.index + t * K;
    const Real *w = kept_.weights + t * K, *dw = up_.dweights + t * K;
    std::fill_n(dp, N, Real(0));
    Real inner = 0, sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      inner += w[k] * dw[k];
      sum += p[index[k]];
    }
    sum = std::max(sum, std::numeric_limits<Real>::min());
    for (int64_t k = 0; k < K; ++k) {
      switch (spec_.gate) {
        case RouterSpec::Gate::kSoftmax: dp[index[k]] = w[k] * (dw[k] - inner); break;
        case RouterSpec::Gate::kSum: dp[index[k]] = (dw[k] - inner) / sum; break;
        case RouterSpec::Gate::kNone: dp[index[k]] = dw[k]; break;
      }
    }
    // Other gates are made of p: there the bias only chooses.
    if (spec_.bias == RouterSpec::Bias::kSelection && spec_.gate == RouterSpec::Gate::kSoftmax) {
      for (int64_t n = 0; n < N; ++n) dbias_[block * N + n] += dp[n];
    }
  }

  void through_losses(int64_t block, const Real* logits, Real* dp, Real* dlogits) {
    const int64_t N = spec_.experts;
    const Real tokens = static_cast<Real>(in_.tokens);
    const Real* share = up_.share + blocks_.sequence(block) * N;
    for (int64_t n = 0; n < N; ++n) dp[n] += up_.balance * static_cast<Real>(N) / tokens * share[n];
    Real most = logits[0], sum = 0;
    for (int64_t n = 1; n < N; ++n) most = std::max(most, logits[n]);
    for (int64_t n = 0; n < N; ++n) sum += dlogits[n] = std::exp(logits[n] - most);
    const Real factor = up_.z * Real(2) / tokens * (most + std::log(sum)) / sum;
    for (int64_t n = 0; n < N; ++n) dlogits[n] *= factor;
  }

  void through_softmax(int64_t block, const Real* logits, const Real* p, const Real* dp, Real* dlogits) {
    const int64_t N = spec_.experts;
    Real inner = 0, dtemperature = 0;
    for (int64_t n = 0; n < N; ++n) inner += p[n] * dp[n];
    for (int64_t n = 0; n < N; ++n) {
      const Real dscaled = p[n] * (dp[n] - inner);
      dtemperature -= dscaled * logits[n];
      dlogits[n] += dscaled / in_.temperature;
    }
    dtemperature_[block] += dtemperature / (in_.temperature * in_.temperature);
  }

  // dscore becomes ddot. d norm(x) / dx = x / norm(x): a token's gradient has a part along x, a gate's one along w.
  Real through_cosine(int64_t t, int64_t block, Real* dscore) {
    const int64_t N = spec_.experts;
    Real inner = 0;
    for (int64_t n = 0; n < N; ++n) {
      const Real product = dscore[n] * kept_.cosines[t * N + n];
      inner += product;
      dw_norm_[block * N + n] += product;
      dscore[n] /= kept_.x_norm[t] * kept_.w_norm[n];
    }
    return along(inner, kept_.x_norm[t]);
  }

  Real along(Real inner, Real norm) const {
    const Real length = norm - static_cast<Real>(spec_.tau);
    return length > Real(kShortestLength) ? -inner / (norm * length) : Real(0);
  }

  void token_dx(int64_t t, Real along_x, Real* sum) {
    const int64_t N = spec_.experts, K = spec_.top_k, D = in_.width;
    std::fill_n(sum, D, Real(0));
    for (int64_t k = 0; up_.dxs != nullptr && k < K; ++k) {
      add_to_sum<T>(sum, up_.dxs + up_.inverse[t * K + k] * D, Real(1), D);
    }
    add_rows<Real>(sum, ddot(t), 1, in_.weight, D, N, D);
    if (learned_noise_) add_rows<Real>(sum, ddot(t) + N, 1, in_.noise_weight, D, N, D);
    if (spec_.cosine()) add_to_sum<T>(sum, in_.x + t * D, along_x, D);
    convert_row(out_.dx + t * D, sum, D);
  }

  // Coefficients of the gate rows in their own gradient; zeros unless scores are cosines.
  std::vector<Real> along_weights() const {
    std::vector<Real> result(spec_.experts, Real(0));
    if (!spec_.cosine()) return result;
    sum_blocks(dw_norm_, spec_.experts, result.data());
    for (int64_t n = 0; n < spec_.experts; ++n) result[n] = along(result[n], kept_.w_norm[n]);
    return result;
  }

  // Columns [begin, begin + kColumns) of dW, and of the gradient of the noise's weight.
  void weight_gradient(int64_t begin, const std::vector<Real>& along_w) {
    const int64_t N = spec_.experts, D = in_.width, columns = std::min(kColumns, D - begin), rows = sides_ * N;
    std::vector<Real> total(rows * kColumns, Real(0)), part(rows * kColumns);
    Real tokens[4 * kColumns] = {};
    for (int64_t first = 0; first < in_.tokens; first += kTokensPerSum) {
      const int64_t last = std::min(in_.tokens, first + kTokensPerSum);
      std::fill(part.begin(), part.end(), Real(0));
      for (int64_t t = first; t < last; t += 4) {
        const int64_t count = std::min<int64_t>(4, last - t);
        for (int64_t i = 0; i < count; ++i) {
          convert_row(tokens + i * kColumns, in_.x + (t + i) * D + begin, columns);
        }
        for (int64_t n = 0; n < rows; ++n) {
          add_rows<Real>(part.data() + n * kColumns, ddot(t) + n, rows, tokens, kColumns, count, columns);
        }
      }
      for (size_t i = 0; i < total.size(); ++i) total[i] += part[i];
    }
    for (int64_t n = 0; n < N; ++n) {
      Real* sum = total.data() + n * kColumns;
      if (spec_.cosine()) add_to_sum<Real>(sum, in_.weight + n * D + begin, along_w[n], columns);
      std::copy_n(sum, columns, out_.dweight + n * D + begin);
      if (learned_noise_) std::copy_n(sum + N * kColumns, columns, out_.dnoise_weight + n * D + begin);
    }
  }

  // out [width] = sums [blocks, width], added up in block order
  void sum_blocks(const std::vector<Real>& sums, int64_t width, Real* out) const {
    std::fill_n(out, width, Real(0));
    for (int64_t block = 0; block < blocks_.count; ++block) {
      for (int64_t i = 0; i < width; ++i) out[i] += sums[block * width + i];
    }
  }

  const RouterSpec& spec_;
  const RouterInputs<T>& in_;
  const Routed<const Real>& kept_;
  const RoutingUpstream<T>& up_;
  const RoutingGradients<T>& out_;
  const TokenBlocks blocks_;
  const bool learned_noise_;
  const int64_t sides_;       // 2 with learned noise, whose weight has a gradient like the gate's
  std::vector<Real> ddots_;   // [T, sides, N]
  std::vector<Real> dbias_, dw_norm_, dtemperature_;  // [blocks, N], [blocks, N], [blocks]
};

}  // namespace

template <typename T>
void route_tokens_backward(const RouterSpec& spec, const RouterInputs<T>& inputs,
                           const Routed<const Accumulator<T>>& routed, const RoutingUpstream<T>& upstream,
                           const RoutingGradients<T>& gradients) {
  RouterBackward<T>(spec, inputs, routed, upstream, gradients).run();
}

#define LIBMOE_FAST_INSTANTIATE(T)                                                                            \
  template void route_tokens_backward(const RouterSpec&, const RouterInputs<T>&, const Routed<const Accumulator<T>>&, \
                                      const RoutingUpstream<T>&, const RoutingGradients<T>&);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(double)
LIBMOE_FAST_INSTANTIATE(BFloat16)
LIBMOE_FAST_INSTANTIATE(Half)

}  // namespace libmoe_fast
