#include "router_spec.h"

#include <initializer_list>
#include <locale>
#include <map>
#include <mutex>
#include <sstream>
#include <utility>

namespace libmoe_fast {

namespace {

// The words "name=value" of an encoded spec.
class Words {
 public:
  Words(const ArgumentCheck& check, const std::string& encoded) : check_(check), encoded_(encoded) {
    std::istringstream stream(encoded);
    for (std::string word; stream >> word;) {
      const size_t equals = word.find('=');
      if (equals != std::string::npos) values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }

  template <typename Number>
  Number number(const char* name) const {
    std::istringstream stream(text(name));
    stream.imbue(std::locale::classic());  // a decimal point, whatever the user's language
    Number value;
    if (!(stream >> value)) fail(name);
    return value;
  }

  template <typename Choice>
  Choice choice(const char* name, std::initializer_list<std::pair<const char*, Choice>> choices) const {
    const std::string& given = text(name);
    for (const auto& [word, value] : choices) {
      if (given == word) return value;
    }
    fail(name);
  }

 private:
  const std::string& text(const char* name) const {
    const auto entry = values_.find(name);
    if (entry == values_.end()) fail(name);
    return entry->second;
  }

  [[noreturn]] void fail(const char* name) const {
    check_.fail("expected `spec` as RouterSpec.encoded makes it, with a known `", name, "`, got '", encoded_, "'");
  }

  const ArgumentCheck& check_;
  const std::string& encoded_;
  std::map<std::string, std::string> values_;
};

}  // namespace

const RouterSpec& RouterSpec::decode(const ArgumentCheck& check, const std::string& encoded) {
  static std::mutex mutex;
  static auto* const known = new std::map<std::string, RouterSpec>;
  const std::lock_guard lock(mutex);
  const auto entry = known->find(encoded);
  if (entry != known->end()) return entry->second;
  return known->emplace(encoded, RouterSpec(check, encoded)).first->second;
}

RouterSpec::RouterSpec(const ArgumentCheck& check, const std::string& encoded) {
  const Words words(check, encoded);
  experts = words.number<int64_t>("num_experts");
  top_k = words.number<int64_t>("top_k");
  check.between(experts, "num_experts", 1, INT32_MAX);
  check.between(top_k, "top_k", 1, experts);
  score = words.choice<Score>("score", {{"linear", Score::kLinear}, {"cosine", Score::kCosine}});
  tau = words.number<double>("tau");
  bias = words.choice<Bias>("bias", {{"none", Bias::kNone}, {"score", Bias::kScore}, {"selection", Bias::kSelection}});
  probability = words.choice<Probability>("probability", {{"softmax", Probability::kSoftmax},
                                                          {"sigmoid", Probability::kSigmoid},
                                                          {"softmax_sigmoid", Probability::kSoftmaxSigmoid},
                                                          {"identity", Probability::kIdentity}});
  gate = words.choice<Gate>("gate", {{"sum", Gate::kSum}, {"softmax", Gate::kSoftmax}, {"none", Gate::kNone}});
  noise = words.choice<Noise>("noise",
                              {{"off", Noise::kOff}, {"gaussian", Noise::kGaussian}, {"learned", Noise::kLearned}});
  noise_std = words.number<double>("noise_std");
}

}  // namespace libmoe_fast
