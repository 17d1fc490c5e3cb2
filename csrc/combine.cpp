// weighted_scatter: each token's K expert outputs, weighted and summed. row_dot: the gradient of those weights.
#include <algorithm>

#include "checks.h"
#include "experts.h"
#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "tensors.h"

namespace libmoe_fast {

namespace {

// Columns summed at a time: the fp32 (or fp64) sums of a block stay in the first-level cache.
constexpr int64_t kBlockColumns = 512;

template <typename T>
void dot_rows(const T* a, const T* b, const int64_t* inverse, Accumulator<T>* out, int64_t tokens, int64_t width,
              int64_t top_k) {
  parallel_rows(tokens, width * top_k, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
        out[i] = dot_row(a + inverse[i] * width, b + t * width, width);
      }
    }
  });
}

}  // namespace

template <typename T>
void combine_rows(const T* y, const int64_t* inverse, const Accumulator<T>* weights, T* out, int64_t tokens,
                  int64_t width, int64_t top_k) {
  parallel_rows(tokens, width * top_k, [=](int64_t begin, int64_t end) {
    Accumulator<T> sum[kBlockColumns];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t* places = inverse + t * top_k;
      const auto weight = [&](int64_t k) { return weights == nullptr ? 1 : weights[t * top_k + k]; };
      for (int64_t column = 0; column < width; column += kBlockColumns) {
        const int64_t columns = std::min(kBlockColumns, width - column);
        start_sum(sum, y + places[0] * width + column, weight(0), columns);
        for (int64_t k = 1; k < top_k; ++k) add_to_sum(sum, y + places[k] * width + column, weight(k), columns);
        convert_row(out + t * width + column, sum, columns);
      }
    }
  });
}

template void combine_rows(const float*, const int64_t*, const float*, float*, int64_t, int64_t, int64_t);
template void combine_rows(const double*, const int64_t*, const double*, double*, int64_t, int64_t, int64_t);
template void combine_rows(const BFloat16*, const int64_t*, const float*, BFloat16*, int64_t, int64_t, int64_t);
template void combine_rows(const Half*, const int64_t*, const float*, Half*, int64_t, int64_t, int64_t);

Tensor weighted_scatter(const Tensor& y, const Tensor& inverse, int64_t top_k, const std::optional<Tensor>& weights) {
  const ArgumentCheck check("weighted_scatter");
  check.between(top_k, "top_k", 1, INT32_MAX);
  check.shape(inverse, "inverse", "[T*top_k]", {-1});
  check.int64(inverse, "inverse");
  const int64_t rows = inverse.size(0), tokens = rows / top_k;
  check.choices(rows, "inverse", tokens, top_k);
  check.shape(y, "y", "[T*top_k, O]", {rows, -1});
  check.floating(y, "y");
  const int64_t width = y.size(1);
  const std::optional<Tensor> gate = check.weights(weights, tokens, top_k, y, "y");  // [T, K]
  const Tensor source = as_contiguous(y);
  const Tensor positions = as_contiguous(inverse);
  check.entries(positions, "inverse", rows);

  Tensor out = new_tensor({tokens, width}, source.scalar_type());  // [T, O]
  dispatch_row_dtype(y.scalar_type(), [&]<typename T>() {
    combine_rows<T>(source.const_data_ptr<T>(), positions.const_data_ptr<int64_t>(),
                    gate ? gate->const_data_ptr<Accumulator<T>>() : nullptr, out.mutable_data_ptr<T>(), tokens, width,
                    top_k);
  });
  return out;
}

Tensor row_dot(const Tensor& a, const Tensor& b, const Tensor& inverse, int64_t top_k) {
  const ArgumentCheck check("row_dot");
  check.between(top_k, "top_k", 1, INT32_MAX);
  check.shape(b, "b", "[T, O]", {-1, -1});
  check.floating(b, "b");
  const int64_t tokens = b.size(0), width = b.size(1);
  check.shape(inverse, "inverse", "[T*top_k]", {-1});
  check.int64(inverse, "inverse");
  const int64_t rows = inverse.size(0);
  check.choices(rows, "inverse", tokens, top_k);
  check.shape(a, "a", "[T*top_k, O]", {rows, width});
  check.same_dtype(a, "a", b, "b");
  const Tensor left = as_contiguous(a);
  const Tensor right = as_contiguous(b);
  const Tensor positions = as_contiguous(inverse);
  check.entries(positions, "inverse", rows);

  Tensor out = new_tensor({tokens, top_k}, accumulator_dtype(a.scalar_type()));  // [T, K]
  dispatch_row_dtype(a.scalar_type(), [&]<typename T>() {
    dot_rows<T>(left.const_data_ptr<T>(), right.const_data_ptr<T>(), positions.const_data_ptr<int64_t>(),
                out.mutable_data_ptr<Accumulator<T>>(), tokens, width, top_k);
  });
  return out;
}

}  // namespace libmoe_fast
