"""The `cpu` backend: the C++ ops of csrc/ as those of fused.py, and the token permutation's fakes and autograd."""

import torch
from torch import Tensor

from libmoe_fast import extension, fused, reference

_lib = torch.ops.libmoe_fast
OPS: fused.FusedOps | None = None  # where the extension is loaded


# ---------------------------------------------------------------------------------------------------------------------
# Token permutation (csrc/): fakes and autograd. Schemas and shapes are documented there.
#
# gather and weighted_scatter are each other's transpose, so each one's backward is the other.


def _gather_fake(x: Tensor, order: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _weighted_scatter_fake(y: Tensor, inverse: Tensor, top_k: int, weights: Tensor | None = None) -> Tensor:
    return y.new_empty(inverse.shape[0] // top_k, y.shape[1])


def _row_dot_fake(a: Tensor, b: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return a.new_empty((inverse.shape[0] // top_k, top_k), dtype=reference.accumulation_dtype(a.dtype))


def _invert(permutation: Tensor) -> Tensor:
    """order <-> inverse, so that an op needs only one of them saved."""
    positions = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


def _permutation_setup(ctx, inputs, output) -> None:
    rows, permutation, ctx.top_k, weights = inputs
    ctx.save_for_backward(rows, permutation, weights)


def _gather_backward(ctx, grad: Tensor):
    x, order, weights = ctx.saved_tensors
    inverse = _invert(order)
    dx = _lib.weighted_scatter(grad, inverse, ctx.top_k, weights)
    dweights = None
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = _lib.row_dot(grad, x, inverse, ctx.top_k).to(weights.dtype)
    return dx, None, None, dweights


def _weighted_scatter_backward(ctx, grad: Tensor):
    y, inverse, weights = ctx.saved_tensors
    dy = _lib.gather(grad, _invert(inverse), ctx.top_k, weights)
    dweights = None
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = _lib.row_dot(y, grad, inverse, ctx.top_k).to(weights.dtype)
    return dy, None, None, dweights


if extension.load().loaded:
    OPS = fused.FusedOps(
        dispatch=_lib.cpu_dispatch.default,
        dispatch_backward=_lib.cpu_dispatch_backward.default,
        experts=_lib.cpu_experts.default,
        experts_backward=_lib.cpu_experts_backward.default,
        permute=_lib.permute_index.default,
    )
    fused.register("cpu", OPS)
    torch.library.register_fake("libmoe_fast::permute_index", fused.permute_fake)
    torch.library.register_fake("libmoe_fast::gather", _gather_fake)
    torch.library.register_fake("libmoe_fast::weighted_scatter", _weighted_scatter_fake)
    torch.library.register_fake("libmoe_fast::row_dot", _row_dot_fake)
    torch.library.register_autograd("libmoe_fast::gather", _gather_backward, setup_context=_permutation_setup)
    torch.library.register_autograd(
        "libmoe_fast::weighted_scatter", _weighted_scatter_backward, setup_context=_permutation_setup
    )
