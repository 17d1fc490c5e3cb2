"""The `cpu` backend: the C++ ops of csrc/, token permutation and experts; their fakes and autograd."""

import torch
from torch import Tensor

from libmoe_fast import extension, reference

_extension = extension.load()


def experts(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    """y [T, O]; arguments as in `reference.experts`."""
    order, inverse, offsets = torch.ops.libmoe_fast.permute_index(index, w1.shape[0])
    tensors = (x, weights, order, inverse, offsets, w1, b1, w2, b2)
    needs_backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = torch.ops.libmoe_fast.grouped_mlp(*tensors, activation, gated, needs_backward)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Token permutation (csrc/): fakes and autograd. Schemas and shapes are documented there.
#
# gather and weighted_scatter are each other's transpose, so each one's backward is the other.


def _permute_index_fake(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.new_empty(index.numel())
    return flat, torch.empty_like(flat), index.new_empty(num_experts + 1)


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
    dx = torch.ops.libmoe_fast.weighted_scatter(grad, inverse, ctx.top_k, weights)
    dweights = None
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = torch.ops.libmoe_fast.row_dot(grad, x, inverse, ctx.top_k).to(weights.dtype)
    return dx, None, None, dweights


def _weighted_scatter_backward(ctx, grad: Tensor):
    y, inverse, weights = ctx.saved_tensors
    dy = torch.ops.libmoe_fast.gather(grad, _invert(inverse), ctx.top_k, weights)
    dweights = None
    if weights is not None and ctx.needs_input_grad[3]:
        dweights = torch.ops.libmoe_fast.row_dot(y, grad, inverse, ctx.top_k).to(weights.dtype)
    return dy, None, None, dweights


# ---------------------------------------------------------------------------------------------------------------------
# The experts (csrc/experts.h): backward saves x, z and the routing only


def _grouped_mlp_fake(x, weights, order, inverse, offsets, w1, b1, w2, b2, activation, gated, keep_z):
    z = x.new_empty(order.shape[0] if keep_z else 0, w1.shape[1])
    return x.new_empty(x.shape[0], w2.shape[1]), z


def _grouped_mlp_backward_fake(
    dy, x, weights, order, inverse, offsets, w1, b1, w2, b2, z, activation, gated, weight_grads
):
    params = [p for p in (w1, w2, b1, b2) if p is not None] if weight_grads else []
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weights, *params)]


def _grouped_mlp_setup(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.gated, ctx.keeps_z = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, z)


def _grouped_mlp_backward(ctx, dy: Tensor | None, _dz: None):
    if dy is None:
        return (None,) * 12
    if not ctx.keeps_z:
        raise RuntimeError("grouped_mlp was called with keep_z=False, which has no backward; call it with keep_z=True")
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on the first read and refuses a second
    *_, b1, _w2, b2, _z = saved
    weight_grads = any(ctx.needs_input_grad[5:9])
    dx, dweights, *grads = torch.ops.libmoe_fast.grouped_mlp_backward(
        dy, *saved, ctx.activation, ctx.gated, weight_grads
    )
    dw1 = dw2 = db1 = db2 = None
    if weight_grads:
        dw1, dw2, *biases = grads
        db1 = biases.pop(0) if b1 is not None else None
        db2 = biases.pop(0) if b2 is not None else None
    return dx, dweights, None, None, None, dw1, db1, dw2, db2, None, None, None


if _extension.loaded:
    torch.library.register_fake("libmoe_fast::permute_index", _permute_index_fake)
    torch.library.register_fake("libmoe_fast::gather", _gather_fake)
    torch.library.register_fake("libmoe_fast::weighted_scatter", _weighted_scatter_fake)
    torch.library.register_fake("libmoe_fast::row_dot", _row_dot_fake)
    torch.library.register_autograd("libmoe_fast::gather", _gather_backward, setup_context=_permutation_setup)
    torch.library.register_autograd(
        "libmoe_fast::weighted_scatter", _weighted_scatter_backward, setup_context=_permutation_setup
    )
    torch.library.register_fake("libmoe_fast::grouped_mlp", _grouped_mlp_fake)
    torch.library.register_fake("libmoe_fast::grouped_mlp_backward", _grouped_mlp_backward_fake)
    torch.library.register_autograd("libmoe_fast::grouped_mlp", _grouped_mlp_backward, setup_context=_grouped_mlp_setup)
