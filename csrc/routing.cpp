// Routing, forward: one pass over x.
#include "routing.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>

#include "parallel.h"
#include "products.h"

namespace libmoe_fast {

namespace {

template <typename Real>
Real sigmoid(Real value) {
  return Real(1) / (Real(1) + std::exp(-value));
}

template <typename Real>
Real largest(const Real* values, int64_t count) {
  Real most = values[0];
  for (int64_t i = 1; i < count; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// p = softmax(values / temperature); returns logsumexp(values / temperature).
template <typename Real>
Real softmax(const Real* values, Real temperature, Real* p, int64_t count) {
  const Real most = largest(values, count) / temperature;
  Real sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += p[i] = std::exp(values[i] / temperature - most);
  for (int64_t i = 0; i < count; ++i) p[i] /= sum;
  return most + std::log(sum);
}

template <typename Real>
Real log_sum_exp(const Real* values, int64_t count) {
  const Real most = largest(values, count);
  Real sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(values[i] - most);
  return most + std::log(sum);
}

// index [k]: the k largest of `values`, best first, ties to the lowest index. NaN and -inf count as the lowest finite
// number: any token chooses k different experts. `best` [k] is scratch memory.
template <typename Real>
void choose_best(const Real* values, int64_t count, int64_t k, int64_t* index, Real* best) {
  constexpr Real kLowest = std::numeric_limits<Real>::lowest();
  int64_t chosen = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Real value = values[i] >= kLowest ? values[i] : kLowest;
    if (chosen == k && value <= best[k - 1]) continue;
    int64_t place = chosen < k ? chosen++ : k - 1;
    for (; place > 0 && best[place - 1] < value; --place) {
      best[place] = best[place - 1];
      index[place] = index[place - 1];
    }
    best[place] = value;
    index[place] = i;
  }
}

template <typename T>
class Router {
 public:
  using Real = Accumulator<T>;

  Router(const RouterSpec& spec, const RouterInputs<T>& inputs, bool over_topk, const Routed<Real>& routed)
      : spec_(spec),
        in_(inputs),
        over_topk_(over_topk),
        out_(routed),
        blocks_(inputs.tokens, inputs.sequences),
        matrix_(inputs.width),
        sums_{std::vector<int64_t>(blocks_.count * spec.experts), std::vector<Real>(blocks_.count * spec.experts),
              std::vector<Real>(blocks_.count)} {
    matrix_.append(in_.weight, spec_.experts);
    if (in_.noise_weight != nullptr) matrix_.append(in_.noise_weight, spec_.experts);
    if (spec_.cosine()) {
      for (int64_t i = 0; i < spec_.experts; ++i) out_.w_norm[i] = norm(matrix_.row(i));
    }
  }

  LossSums<Real> run() {
    const int64_t workers = torch::stable::get_num_threads();
    std::vector<Local> locals(workers, Local(spec_, matrix_));
    for_each_task(blocks_.count, [&](int64_t block, int64_t worker) {
      for (int64_t t = blocks_.begin(block); t < blocks_.end(block); t += kDotRows) {
        const int count = static_cast<int>(std::min<int64_t>(kDotRows, blocks_.end(block) - t));
        score(t, count, locals[worker]);
        for (int i = 0; i < count; ++i) choose(t + i, block, locals[worker], i);
      }
    });
    return std::move(sums_);
  }

 private:
  // Memory of one worker.
  struct Local {
    std::vector<Real> rows;       // [kDotRows, padded width]: tokens
    std::vector<Real> products;   // [kDotRows, N or 2N]: with the weight, and with the noise's
    std::vector<Real> selection;  // [N]
    std::vector<Real> best;       // [K]

    Local(const RouterSpec& spec, const PaddedRows<Real>& matrix)
        : rows(kDotRows * matrix.padded()),
          products(kDotRows * matrix.rows()),
          selection(spec.experts),
          best(spec.top_k) {}
  };

  Real norm(const Real* row) const {
    const Real length = std::sqrt(dot_row<Real>(row, row, matrix_.padded()));
    return std::max(length + static_cast<Real>(spec_.tau), Real(1e-12));
  }

  // Products and norms of `count` tokens from t on.
  void score(int64_t t, int count, Local& local) {
    const Real* rows[kDotRows];
    for (int i = 0; i < count; ++i) {
      Real* row = local.rows.data() + i * matrix_.padded();
      widen_row<T>(in_.x + (t + i) * in_.width, in_.width, row);
      rows[i] = row;
      if (spec_.cosine()) out_.x_norm[t + i] = norm(row);
    }
    dot_rows_with<Real>(rows, count, matrix_, local.products.data(), matrix_.rows());
  }

  // Everything else of token t, the i-th of `local`.
  void choose(int64_t t, int64_t block, Local& local, int i) {
    const int64_t N = spec_.experts, K = spec_.top_k;
    Real* score = local.products.data() + i * matrix_.rows();
    finish_score(t, score, score + N);

    Real *logits = out_.logits + t * N, *p = out_.probs + t * N;
    for (int64_t n = 0; n < N; ++n) logits[n] = spec_.sigmoid() ? sigmoid(score[n]) : score[n];
    Real log_sum = 0;
    if (spec_.softmax()) {
      log_sum = softmax(logits, in_.temperature, p, N);
    } else {
      std::copy_n(logits, N, p);
    }
    if (!spec_.softmax() || in_.temperature != Real(1)) log_sum = log_sum_exp(logits, N);
    const Real* selection = p;
    if (spec_.bias == RouterSpec::Bias::kSelection) {
      for (int64_t n = 0; n < N; ++n) local.selection[n] = p[n] + in_.bias[n];
      selection = local.selection.data();
    }

    int64_t* index = out_.index + t * K;
    choose_best(selection, N, K, index, local.best.data());
    weigh(index, p, selection, out_.weights + t * K);

    for (int64_t k = 0; k < (over_topk_ ? K : 1); ++k) ++sums_.counted[block * N + index[k]];
    for (int64_t n = 0; n < N; ++n) sums_.probs[block * N + n] += p[n];
    sums_.squares[block] += log_sum * log_sum;
  }

  // From <x, w> to the score. `noise` [N]: <x, noise_weight>, where it is learned.
  void finish_score(int64_t t, Real* score, const Real* noise) {
    const int64_t N = spec_.experts;
    if (spec_.cosine()) {
      for (int64_t n = 0; n < N; ++n) score[n] /= out_.x_norm[t] * out_.w_norm[n];
      std::copy_n(score, N, out_.cosines + t * N);
    }
    if (spec_.bias == RouterSpec::Bias::kScore) {
      for (int64_t n = 0; n < N; ++n) score[n] += in_.bias[n];
    }
    if (in_.noise == nullptr) return;
    for (int64_t n = 0; n < N; ++n) {
      Real scale = static_cast<Real>(spec_.noise_std);
      if (spec_.noise == RouterSpec::Noise::kLearned) {
        scale = noise[n] > Real(20) ? noise[n] : std::log1p(std::exp(noise[n]));  // softplus
        out_.noise_scale[t * N + n] = scale;
      }
      score[n] += in_.noise[t * N + n] * scale;
    }
  }

  void weigh(const int64_t* index, const Real* p, const Real* selection, Real* weights) const {
    const int64_t K = spec_.top_k;
    const Real* chosen = spec_.gate == RouterSpec::Gate::kSoftmax ? selection : p;
    for (int64_t k = 0; k < K; ++k) weights[k] = chosen[index[k]];
    if (spec_.gate == RouterSpec::Gate::kSoftmax) {
      softmax(weights, Real(1), weights, K);
    } else if (spec_.gate == RouterSpec::Gate::kSum) {
      Real sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += weights[k];
      sum = std::max(sum, std::numeric_limits<Real>::min());
      for (int64_t k = 0; k < K; ++k) weights[k] /= sum;
    }
  }

  const RouterSpec& spec_;
  const RouterInputs<T>& in_;
  const bool over_topk_;
  const Routed<Real> out_;
  const TokenBlocks blocks_;
  PaddedRows<Real> matrix_;  // [N or 2N, D]: the weight, and the noise's below
  LossSums<Real> sums_;
};

}  // namespace

template <typename T>
LossSums<Accumulator<T>> route_tokens(const RouterSpec& spec, const RouterInputs<T>& inputs, bool over_topk,
                                      const Routed<Accumulator<T>>& routed) {
  return Router<T>(spec, inputs, over_topk, routed).run();
}

template LossSums<float> route_tokens(const RouterSpec&, const RouterInputs<float>&, bool, const Routed<float>&);
template LossSums<double> route_tokens(const RouterSpec&, const RouterInputs<double>&, bool, const Routed<double>&);
template LossSums<float> route_tokens(const RouterSpec&, const RouterInputs<BFloat16>&, bool, const Routed<float>&);
template LossSums<float> route_tokens(const RouterSpec&, const RouterInputs<Half>&, bool, const Routed<float>&);

}  // namespace libmoe_fast
