// The experts of one layer, behind two ways to multiply matrices.
//
//   forward:   z = xs W1^T + b1 -> a = act(z) -> ys = a W2^T + b2 -> y = sum over a token's choices of weight * ys
//   backward:  g = dys W2 -> dweight = <g, a> + <dys, b2>, dz = weight g act'(z)
//              -> dW2 = dys^T (weight a), dW1 = dz^T xs, dxs = dz W1
//
// xs and dys are the rows of x and dy in expert order; expert e owns rows offsets[e] to offsets[e + 1]. Rows from
// offsets[N] on are choices that no expert runs: they add nothing, and have no gradient; one may stand for all of them.
// Backward needs no forward GEMM again, because <dy, W2 a + b2> = <W2^T dy, a> + <dy, b2>.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activations.h"
#include "dtypes.h"

namespace libmoe_fast {

template <typename T>
struct ExpertInputs {
  int64_t tokens, top_k, choices, experts;  // T, K, sorted rows (T*K, or those that run and one for the rest), N
  int64_t in, hidden, up, out;              // D, H, rows of w1 (2H if gated), O
  Activation activation;
  bool gated;
  const T* x;                      // [T, D]
  const Accumulator<T>* weights;   // [T, K]
  const int64_t *order, *inverse, *offsets;
  const T *w1, *b1, *w2, *b2;      // biases may be null

  const T* row_of(const T* matrix, int64_t width, int64_t row) const { return matrix + order[row] / top_k * width; }
  Accumulator<T> weight_of(int64_t row) const { return weights[order[row]]; }
  int64_t run() const { return offsets[experts]; }  // choices that an expert runs
  int64_t rows_of(int64_t expert) const { return offsets[expert + 1] - offsets[expert]; }
  const T* first_weight(int64_t expert) const { return w1 + expert * up * in; }
  const T* second_weight(int64_t expert) const { return w2 + expert * out * hidden; }
  const T* first_bias(int64_t expert) const { return b1 == nullptr ? nullptr : b1 + expert * up; }
  const T* second_bias(int64_t expert) const { return b2 == nullptr ? nullptr : b2 + expert * out; }
};

// Of a matrix [T*K, width], the rows that no expert has written.
template <typename T>
void zero_rest(const ExpertInputs<T>& inputs, T* matrix, int64_t width) {
  std::fill(matrix + inputs.run() * width, matrix + inputs.choices * width, T(0));
}

template <typename T>
struct ExpertGradients {
  T* drows;                    // [T*K, D]: the gradient of xs
  Accumulator<T>* dweights;    // [T, K]
  T *dw1, *dw2, *db1, *db2;    // dw1 and dw2 null for frozen experts, db1 and db2 also without that bias
};

// In tiles (tile_gemm.h): fp32 and bf16 where tiles_pay. z [T*K, up] may be null: then it is not kept.
template <typename T>
void forward_in_tiles(const ExpertInputs<T>& inputs, T* z, T* y);
template <typename T>
void backward_in_tiles(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients);

// With torch's mm: every dtype, every machine.
template <typename T>
void forward_with_mm(const ExpertInputs<T>& inputs, T* z, T* y);
template <typename T>
void backward_with_mm(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients);

// y [T, O] = each token's K rows of ys [T*K, O], weighted (by 1 if weights is null) and summed in order.
template <typename T>
void combine_rows(const T* y, const int64_t* inverse, const Accumulator<T>* weights, T* out, int64_t tokens,
                  int64_t width, int64_t top_k);

}  // namespace libmoe_fast
