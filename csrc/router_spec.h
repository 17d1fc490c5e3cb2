// What a router is (libmoe_fast/spec.py): the choices of its pipeline, read from RouterSpec.encoded.
#pragma once

#include <cstdint>
#include <string>

#include "checks.h"

namespace libmoe_fast {

struct RouterSpec {
  enum class Score { kLinear, kCosine };
  enum class Bias { kNone, kScore, kSelection };
  enum class Probability { kSoftmax, kSigmoid, kSoftmaxSigmoid, kIdentity };
  enum class Gate { kSum, kSoftmax, kNone };
  enum class Noise { kOff, kGaussian, kLearned };

  int64_t experts, top_k;  // N, K
  Score score;
  double tau;
  Bias bias;
  Probability probability;
  Gate gate;
  Noise noise;
  double noise_std;

  // From "num_experts=4 top_k=2 score=linear ..."; anything else is an error of the op that `check` speaks for. Read once:
  // a program has few specs, and reading one takes longer than routing a few tokens. The result is never destroyed.
  static const RouterSpec& decode(const ArgumentCheck& check, const std::string& encoded);

  bool cosine() const { return score == Score::kCosine; }
  bool sigmoid() const { return probability == Probability::kSigmoid || probability == Probability::kSoftmaxSigmoid; }
  bool softmax() const { return probability == Probability::kSoftmax || probability == Probability::kSoftmaxSigmoid; }

 private:
  RouterSpec(const ArgumentCheck& check, const std::string& encoded);
};

}  // namespace libmoe_fast
