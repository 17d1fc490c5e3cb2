// gather: the rows of x in expert order, optionally times their gate weight.
#include <algorithm>

#include "checks.h"
#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "tensors.h"

namespace libmoe_fast {

namespace {

template <typename T>
void gather_rows(const T* x, const int64_t* order, const Accumulator<T>* weights, T* out, int64_t rows, int64_t width,
                 int64_t top_k) {
  parallel_rows(rows, width, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = x + order[r] / top_k * width;
      if (weights == nullptr) {
        std::copy_n(row, width, out + r * width);
      } else {
        scale_row(out + r * width, row, weights[order[r]], width);
      }
    }
  });
}

}  // namespace

Tensor gather(const Tensor& x, const Tensor& order, int64_t top_k, const std::optional<Tensor>& weights) {
  const ArgumentCheck check("gather");
  check.between(top_k, "top_k", 1, INT32_MAX);
  check.shape(x, "x", "[T, D]", {-1, -1});
  check.floating(x, "x");
  check.shape(order, "order", "[T*top_k]", {-1});
  check.int64(order, "order");
  const int64_t tokens = x.size(0), width = x.size(1), rows = order.size(0);
  check.choices(rows, "order", tokens, top_k);
  const std::optional<Tensor> gate = check.weights(weights, tokens, top_k, x, "x");  // [T, K]
  const Tensor source = as_contiguous(x);
  const Tensor positions = as_contiguous(order);
  check.entries(positions, "order", rows);

  Tensor out = new_tensor({rows, width}, source.scalar_type());  // [T*K, D]
  dispatch_row_dtype(x.scalar_type(), [&]<typename T>() {
    gather_rows<T>(source.const_data_ptr<T>(), positions.const_data_ptr<int64_t>(),
                   gate ? gate->const_data_ptr<Accumulator<T>>() : nullptr, out.mutable_data_ptr<T>(), rows, width,
                   top_k);
  });
  return out;
}

}  // namespace libmoe_fast
