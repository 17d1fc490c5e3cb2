// cpu_experts and cpu_experts_backward: arguments checked, results allocated, one of the two ways chosen.
#include "experts.h"

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "scratch.h"
#include "tensors.h"
#include "tile_gemm.h"

namespace libmoe_fast {

namespace {

// Contiguous arguments, held as long as the pointers into them are used.
struct ExpertTensors {
  Tensor x, weights, order, inverse, offsets, w1, w2;
  std::optional<Tensor> b1, b2;
};

// The arguments that forward and backward share, checked.
class ExpertArguments {
 public:
  ExpertArguments(const ArgumentCheck& check, const ExpertTensors& given, const std::string& activation, bool gated)
      : gated_(gated) {
    const Tensor &x = given.x, &w1 = given.w1, &w2 = given.w2;
    check.shape(x, "x", "[T, D]", {-1, -1});
    check.floating(x, "x");
    check.shape(w1, "w1", "[N, H, D], gated [N, 2H, D]", {-1, -1, x.size(1)});
    check.same_dtype(w1, "w1", x, "x");
    const int64_t experts = w1.size(0), up = w1.size(1), hidden = gated ? up / 2 : up;
    if (gated && up % 2 != 0) check.fail("expected an even number of rows in gated `w1`, got ", up);
    check.shape(w2, "w2", "[N, O, H]", {experts, -1, hidden});
    check.same_dtype(w2, "w2", x, "x");
    if (x.size(1) == 0 || hidden == 0 || w2.size(1) == 0) {
      check.fail("expected D, H and O of at least 1, got ", x.size(1), ", ", hidden, " and ", w2.size(1));
    }
    check_bias(check, given.b1, "b1", experts, up, x);
    check_bias(check, given.b2, "b2", experts, w2.size(1), x);
    check.shape(given.weights, "weights", "[T, top_k]", {x.size(0), -1});
    check.between(given.weights.size(1), "top_k", 1, INT32_MAX);
    if (!find_activation(activation, activation_)) {
      check.fail("expected `activation` gelu, gelu_pytorch_tanh, quick_gelu, relu, silu or gpt_oss, got ", activation);
    }
    held_ = {as_contiguous(x),
             *check.weights(given.weights, x.size(0), given.weights.size(1), x, "x"),
             permutation(check, given.order, "order"),
             permutation(check, given.inverse, "inverse"),
             row_bounds(check, given.offsets, experts),
             as_contiguous(w1),
             as_contiguous(w2),
             as_contiguous(given.b1),
             as_contiguous(given.b2)};
    check_permutation(check);
  }

  const ExpertTensors& tensors() const { return held_; }
  int64_t choices() const { return held_.order.size(0); }

  template <typename T>
  ExpertInputs<T> inputs() const {
    const ExpertTensors& t = held_;
    const auto optional = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
    };
    return {.tokens = t.x.size(0),
            .top_k = t.weights.size(1),
            .choices = choices(),
            .experts = t.w1.size(0),
            .in = t.x.size(1),
            .hidden = t.w2.size(2),
            .up = t.w1.size(1),
            .out = t.w2.size(1),
            .activation = activation_,
            .gated = gated_,
            .x = t.x.const_data_ptr<T>(),
            .weights = t.weights.const_data_ptr<Accumulator<T>>(),
            .order = t.order.const_data_ptr<int64_t>(),
            .inverse = t.inverse.const_data_ptr<int64_t>(),
            .offsets = t.offsets.const_data_ptr<int64_t>(),
            .w1 = t.w1.const_data_ptr<T>(),
            .b1 = optional(t.b1),
            .w2 = t.w2.const_data_ptr<T>(),
            .b2 = optional(t.b2)};
  }

 private:
  static void check_bias(const ArgumentCheck& check, const std::optional<Tensor>& bias, const char* name,
                         int64_t experts, int64_t width, const Tensor& x) {
    if (!bias.has_value()) return;
    check.shape(*bias, name, "[N, width of its layer]", {experts, width});
    check.same_dtype(*bias, name, x, "x");
  }

  static Tensor permutation(const ArgumentCheck& check, const Tensor& given, const char* name) {
    check.shape(given, name, "[T*top_k]", {-1});
    check.int64(given, name);
    return as_contiguous(given);
  }

  // Offsets decide where rows are read and written, so they are checked like an index.
  static Tensor row_bounds(const ArgumentCheck& check, const Tensor& given, int64_t experts) {
    check.shape(given, "offsets", "[N+1] or more", {-1});
    check.between(given.size(0), "length of `offsets`", experts + 1, INT64_MAX);
    check.int64(given, "offsets");
    return as_contiguous(given);
  }

  void check_permutation(const ArgumentCheck& check) const {
    check.choices(held_.inverse.size(0), "inverse", held_.x.size(0), held_.weights.size(1));
    check.between(choices(), "length of `order`", 0, held_.inverse.size(0));
    check.entries(held_.order, "order", held_.inverse.size(0));
    check.entries(held_.inverse, "inverse", choices());
    const auto* bounds = held_.offsets.const_data_ptr<int64_t>();
    const int64_t last = held_.offsets.size(0) - 1;
    bool ascending = bounds[0] == 0 && bounds[last] == choices();
    for (int64_t slot = 0; slot < last; ++slot) ascending &= bounds[slot] <= bounds[slot + 1];
    if (!ascending) check.fail("expected `offsets` to ascend from 0 to the length of `order`, ", choices());
  }

  bool gated_;
  Activation activation_;
  ExpertTensors held_;
};

template <typename T>
constexpr bool kHasTiles = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;

// The gradients of an expert without tokens, and of choices without an expert, are zeros; nothing else writes them.
template <typename T>
void zero_idle(const ExpertInputs<T>& inputs, const ExpertGradients<T>& gradients) {
  const auto zero = [](T* stacked, int64_t expert, int64_t size) {
    if (stacked != nullptr) std::fill_n(stacked + expert * size, size, T(0));
  };
  for (int64_t expert = 0; expert < inputs.experts; ++expert) {
    if (inputs.rows_of(expert) > 0) continue;
    zero(gradients.dw1, expert, inputs.up * inputs.in);
    zero(gradients.dw2, expert, inputs.out * inputs.hidden);
    zero(gradients.db1, expert, inputs.up);
    zero(gradients.db2, expert, inputs.out);
  }
  zero_rest(inputs, gradients.drows, inputs.in);
  const int64_t all = inputs.tokens * inputs.top_k;
  if (inputs.run() < all) std::fill_n(gradients.dweights, all, Accumulator<T>(0));
}

}  // namespace

std::tuple<Tensor, Tensor> cpu_experts(const Tensor& x, const std::optional<Tensor>& /*rows*/, const Tensor& weights,
                                       const Tensor& order, const Tensor& inverse, const Tensor& offsets,
                                       const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                                       const std::optional<Tensor>& b2, const std::string& activation, bool gated,
                                       bool store_z) {
  const ArgumentCheck check("cpu_experts");
  const ExpertArguments arguments(check, {x, weights, order, inverse, offsets, w1, w2, b1, b2}, activation, gated);
  Tensor y = new_tensor({x.size(0), w2.size(1)}, x.scalar_type());                          // [T, O]
  Tensor z = new_tensor({store_z ? arguments.choices() : 0, w1.size(1)}, x.scalar_type());  // [T*K, H or 2H]
  dispatch_row_dtype(x.scalar_type(), [&]<typename T>() {
    const ExpertInputs<T> inputs = arguments.inputs<T>();
    T* kept = store_z ? z.mutable_data_ptr<T>() : nullptr;
    if constexpr (kHasTiles<T>) {
      if (tiles_pay(x.scalar_type())) {
        return forward_in_tiles<T>(inputs, kept, y.mutable_data_ptr<T>());
      }
    }
    forward_with_mm<T>(inputs, kept, y.mutable_data_ptr<T>());
  });
  return {y, z};
}

std::vector<Tensor> cpu_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& weights, const Tensor& order,
                                         const Tensor& inverse, const Tensor& offsets, const Tensor& w1,
                                         const std::optional<Tensor>& b1, const Tensor& w2,
                                         const std::optional<Tensor>& b2, const Tensor& z,
                                         const std::string& activation, bool gated, bool sum_over_k,
                                         bool weight_grads) {
  const ArgumentCheck check("cpu_experts_backward");
  const ExpertArguments arguments(check, {x, weights, order, inverse, offsets, w1, w2, b1, b2}, activation, gated);
  check.shape(dy, "dy", "[T, O]", {x.size(0), w2.size(1)});
  check.same_dtype(dy, "dy", x, "x");
  check.shape(z, "z", "[T*top_k, H], gated [T*top_k, 2H]", {arguments.choices(), w1.size(1)});
  check.same_dtype(z, "z", x, "x");
  const Tensor grad = as_contiguous(dy), hidden = as_contiguous(z);
  const ExpertTensors& tensors = arguments.tensors();

  const auto like = [](const Tensor& tensor) { return new_tensor(tensor.sizes().vec(), tensor.scalar_type()); };
  Tensor drows = new_tensor({arguments.choices(), x.size(1)}, x.scalar_type()), dweights = like(tensors.weights);
  std::optional<Tensor> dw1, db1, dw2, db2;
  if (weight_grads) {
    dw1 = like(tensors.w1);
    dw2 = like(tensors.w2);
    if (b1.has_value()) db1 = like(*tensors.b1);
    if (b2.has_value()) db2 = like(*tensors.b2);
  }
  std::vector<Tensor> results{drows};
  dispatch_row_dtype(x.scalar_type(), [&]<typename T>() {
    const ExpertInputs<T> inputs = arguments.inputs<T>();
    const auto pointer = [](std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->mutable_data_ptr<T>() : nullptr;
    };
    const ExpertGradients<T> gradients{.drows = drows.mutable_data_ptr<T>(),
                                       .dweights = dweights.mutable_data_ptr<Accumulator<T>>(),
                                       .dw1 = pointer(dw1),
                                       .dw2 = pointer(dw2),
                                       .db1 = pointer(db1),
                                       .db2 = pointer(db2)};
    zero_idle(inputs, gradients);
    const T *dy_rows = grad.const_data_ptr<T>(), *z_rows = hidden.const_data_ptr<T>();
    bool in_tiles = false;
    if constexpr (kHasTiles<T>) {
      in_tiles = tiles_pay(x.scalar_type());
      if (in_tiles) backward_in_tiles<T>(inputs, dy_rows, z_rows, gradients);
    }
    if (!in_tiles) backward_with_mm<T>(inputs, dy_rows, z_rows, gradients);
    if (!sum_over_k) return;
    results[0] = new_tensor({x.size(0), x.size(1)}, x.scalar_type());  // dx [T, D]
    combine_rows<T>(drows.const_data_ptr<T>(), inputs.inverse, nullptr, results[0].mutable_data_ptr<T>(),
                    inputs.tokens, inputs.in, inputs.top_k);
  });
  results.push_back(with_dtype(dweights, weights.scalar_type()));
  for (const std::optional<Tensor>& gradient : {dw1, db1, dw2, db2}) {
    if (gradient.has_value()) results.push_back(*gradient);
  }
  return results;
}

}  // namespace libmoe_fast
