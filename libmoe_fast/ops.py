"""torch.library ops, their autograd, and the choice of backend.

Backends are chosen per call: the `backend` argument, else LIBMOE_FAST_BACKEND, else the fastest that works on the
tensors' device. One asked for by name that cannot work is an error, never another backend.

    reference   plain PyTorch (reference.py), anywhere
    cpu         C++ token permutation and grouped expert GEMMs, on CPU tensors
"""

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from libmoe_fast import extension, grouped_mlp, reference
from libmoe_fast.errors import BackendError
from libmoe_fast.spec import Routing

BACKENDS = ("reference", "cpu")
ENVIRONMENT_VARIABLE = "LIBMOE_FAST_BACKEND"

_extension = extension.load()


# ---------------------------------------------------------------------------------------------------------------------
# Choice of backend


def available_backends() -> dict[str, str | None]:
    """Every backend -> None where it works here, else what is missing and how to get it."""
    return {"reference": None, "cpu": None if _extension.loaded else f"{_extension.reason}; {_extension.hint}"}


def choose_backend(requested: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`. Raises BackendError if the one asked for is unknown or cannot work."""
    name = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is None:
        return "cpu" if device.type == "cpu" and _extension.loaded else "reference"
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if reason := available_backends()[name]:
        raise BackendError(f"backend {name!r} is not usable here: {reason}")
    if name == "cpu" and device.type not in ("cpu", "meta"):
        raise BackendError(f"backend 'cpu' was asked for, but the tokens are on {device}; move them, or choose another")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The two halves of a layer


def route(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None, **options) -> Routing:
    """Chooses experts for tokens x [T, D]; arguments and result as in `reference.route`."""
    choose_backend(backend, x.device)
    return reference.route(x, weight, bias, **options)


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
    gated: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Runs the chosen experts, y [T, O]; arguments as in `reference.experts`. Dropless, deterministic."""
    if choose_backend(backend, x.device) == "reference":
        return reference.experts(x, weights, index, w1, b1, w2, b2, activation=activation, gated=gated)
    order, inverse, offsets = torch.ops.libmoe_fast.permute_index(index, w1.shape[0])
    y, _ = grouped_mlp_op(x, weights, order, inverse, offsets, w1, b1, w2, b2, activation, gated)
    return y


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32 (float64 for float64), whatever the dtypes: routers never round on the way to a choice."""
    dtype = reference.accumulation_dtype(x.dtype)
    return F.linear(x.to(dtype), weight.to(dtype))


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


if _extension.loaded:
    torch.library.register_fake("libmoe_fast::permute_index", _permute_index_fake)
    torch.library.register_fake("libmoe_fast::gather", _gather_fake)
    torch.library.register_fake("libmoe_fast::weighted_scatter", _weighted_scatter_fake)
    torch.library.register_fake("libmoe_fast::row_dot", _row_dot_fake)
    torch.library.register_autograd("libmoe_fast::gather", _gather_backward, setup_context=_permutation_setup)
    torch.library.register_autograd(
        "libmoe_fast::weighted_scatter", _weighted_scatter_backward, setup_context=_permutation_setup
    )


# ---------------------------------------------------------------------------------------------------------------------
# Grouped experts (grouped_mlp.py) as ops, so that a compiled graph sees no per-expert loop and no host sync


@torch.library.custom_op("libmoe_fast::grouped_mlp", mutates_args=(), device_types="cpu")
def grouped_mlp_op(
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    return grouped_mlp.forward(x, weights, order, inverse, offsets, w1, b1, w2, b2, activation, gated)


@grouped_mlp_op.register_fake
def _(x, weights, order, inverse, offsets, w1, b1, w2, b2, activation, gated):
    return x.new_empty(x.shape[0], w2.shape[1]), x.new_empty(order.shape[0], w1.shape[1])


@torch.library.custom_op("libmoe_fast::grouped_mlp_backward", mutates_args=(), device_types="cpu")
def grouped_mlp_backward_op(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    z: Tensor,
    activation: str,
    gated: bool,
    weight_grads: bool,
) -> list[Tensor]:
    return grouped_mlp.backward(
        dy, x, weights, order, inverse, offsets, w1, b1, w2, b2, z, activation, gated, weight_grads
    )


@grouped_mlp_backward_op.register_fake
def _(dy, x, weights, order, inverse, offsets, w1, b1, w2, b2, z, activation, gated, weight_grads):
    params = [p for p in (w1, w2, b1, b2) if p is not None] if weight_grads else []
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weights, *params)]


def _grouped_mlp_setup(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.gated = inputs
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, z)


def _grouped_mlp_backward(ctx, dy: Tensor | None, _dz: None):
    if dy is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on the first read and refuses a second
    *_, b1, _w2, b2, _z = saved
    weight_grads = any(ctx.needs_input_grad[5:9])
    dx, dweights, *grads = grouped_mlp_backward_op(dy, *saved, ctx.activation, ctx.gated, weight_grads)
    dw1 = dw2 = db1 = db2 = None
    if weight_grads:
        dw1, dw2, *biases = grads
        db1 = biases.pop(0) if b1 is not None else None
        db2 = biases.pop(0) if b2 is not None else None
    return dx, dweights, None, None, None, dw1, db1, dw2, db2, None, None


grouped_mlp_op.register_autograd(_grouped_mlp_backward, setup_context=_grouped_mlp_setup)


# ---------------------------------------------------------------------------------------------------------------------
# The auxiliary loss, attached to the gate weights


@torch.library.custom_op("libmoe_fast::attach_aux_loss", mutates_args=())
def attach_aux_loss(weights: Tensor, aux_loss: Tensor, scale: Tensor) -> Tensor:
    """Returns the gate weights unchanged; backward also sends the gradient `scale` into `aux_loss`.

    So `loss.backward()` trains on loss + aux_loss, although nobody added them (the idea of Megatron's
    MoEAuxLossAutoScaler). The gate weights [T, K] are the smallest tensor that every output depends on. `scale` is
    read when backward runs, not when forward ran: it is the gradient that arrives at the loss (see upcycle.py).
    """
    return weights.clone()


@attach_aux_loss.register_fake
def _(weights, aux_loss, scale):
    return torch.empty_like(weights)


@torch.library.custom_op("libmoe_fast::aux_loss_gradient", mutates_args=())
def aux_loss_gradient(grad_weights: Tensor, scale: Tensor) -> Tensor:
    """`scale`, as an op on an incoming gradient: a compiler then cannot read it ahead of backward."""
    return scale.clone()


@aux_loss_gradient.register_fake
def _(grad_weights, scale):
    return torch.empty_like(scale)


def _attach_setup(ctx, inputs, output) -> None:
    _, aux_loss, scale = inputs
    ctx.aux_dtype = aux_loss.dtype
    ctx.save_for_backward(scale)


def _attach_backward(ctx, grad: Tensor):
    (scale,) = ctx.saved_tensors
    return grad, aux_loss_gradient(grad, scale).to(ctx.aux_dtype), None


attach_aux_loss.register_autograd(_attach_backward, setup_context=_attach_setup)
