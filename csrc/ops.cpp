// Schemas and registration. Fakes and autograd are registered from Python (libmoe_fast/cpu_backend.py).
#include "ops.h"

#include <torch/csrc/stable/library.h>

// Read from the file by libmoe_fast/extension.py, without loading it: a library that will not load can still say which
// torch it was built with.
extern "C" __attribute__((used, visibility("default"))) const char libmoe_fast_built_with[] =
    "libmoe_fast built with torch " LIBMOE_FAST_TORCH_VERSION;

STABLE_TORCH_LIBRARY(libmoe_fast, m) {
  m.def("permute_index(Tensor index, int num_experts) -> (Tensor order, Tensor inverse, Tensor offsets)");
  m.def("gather(Tensor x, Tensor order, int top_k, Tensor? weights=None) -> Tensor");
  m.def("weighted_scatter(Tensor y, Tensor inverse, int top_k, Tensor? weights=None) -> Tensor");
  m.def("row_dot(Tensor a, Tensor b, Tensor inverse, int top_k) -> Tensor");
  // The fused backends' ops; libmoe_fast/fused.py has the same for Triton.
  m.def(
      "cpu_dispatch(Tensor x, Tensor weight, Tensor? bias, Tensor? noise, Tensor? noise_weight, "
      "Tensor? learned_temperature, Tensor? aux_scale, float temperature, str spec, int sequences, bool over_topk, "
      "float balance_coef, float z_coef) -> Tensor[]");
  m.def(
      "cpu_dispatch_backward(Tensor? drows, Tensor dweights, Tensor? dlosses, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? noise, Tensor? noise_weight, Tensor? learned_temperature, Tensor? aux_scale, Tensor[] routed, "
      "Tensor inverse, Tensor first_share, float temperature, str spec, float balance_coef, float z_coef) -> Tensor[]");
  m.def(
      "cpu_experts(Tensor x, Tensor? rows, Tensor weights, Tensor order, Tensor inverse, Tensor offsets, Tensor w1, "
      "Tensor? b1, Tensor w2, Tensor? b2, str activation, bool gated, bool store_z) -> (Tensor y, Tensor z)");
  m.def(
      "cpu_experts_backward(Tensor dy, Tensor x, Tensor weights, Tensor order, Tensor inverse, Tensor offsets, "
      "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor z, str activation, bool gated, bool sum_over_k, "
      "bool weight_grads) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(libmoe_fast, CPU, m) {
  m.impl("permute_index", TORCH_BOX(&libmoe_fast::permute_index));
  m.impl("gather", TORCH_BOX(&libmoe_fast::gather));
  m.impl("weighted_scatter", TORCH_BOX(&libmoe_fast::weighted_scatter));
  m.impl("row_dot", TORCH_BOX(&libmoe_fast::row_dot));
  m.impl("cpu_dispatch", TORCH_BOX(&libmoe_fast::cpu_dispatch));
  m.impl("cpu_dispatch_backward", TORCH_BOX(&libmoe_fast::cpu_dispatch_backward));
  m.impl("cpu_experts", TORCH_BOX(&libmoe_fast::cpu_experts));
  m.impl("cpu_experts_backward", TORCH_BOX(&libmoe_fast::cpu_experts_backward));
}
