"""The `triton` backend: the kernels of kernels/launch.py as torch.library ops, with fakes and autograd.

    triton_dispatch  x, router -> index, gate weights, auxiliary losses, permutation, rows     backward: dx, drouter
    triton_experts   rows, gate weights, experts -> y                                          backward: drows, dexperts

`rows` [T*K, D] carries the gradient of x from the experts to the routing, whose backward kernel sums it over K while
it adds its own: no launch and no [T, D] tensor between the two. Nothing in either op waits for the device.
"""

import functools
import json

import torch
from torch import Tensor

from libmoe_fast.kernels import dispatch as kernels
from libmoe_fast.kernels.dispatch import Permuted, Routed, RouterInputs
from libmoe_fast.kernels.experts import ExpertWeights, combine
from libmoe_fast.kernels.experts import experts as run_experts
from libmoe_fast.kernels.experts import experts_backward as run_experts_backward
from libmoe_fast.spec import AuxLosses, Dispatch, LossOptions, RouterSpec, Routing


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RouterSpec,
    temperature: Tensor | float,
    noise: Tensor | None,
    noise_weight: Tensor | None,
    options: LossOptions | None,
) -> Routing:
    """Fused `reference.route`, with the auxiliary losses and the dispatch. T > 0."""
    learned = isinstance(temperature, Tensor)
    asked = options or LossOptions(0.0, 0.0)
    rows, index, weights, probs, logits, *permutation, losses, share, _ = dispatch_op(
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if noise is None else noise.contiguous(),
        None if noise_weight is None else noise_weight.contiguous(),
        temperature if learned else None,
        asked.aux_scale if spec.aux else None,
        1.0 if learned else temperature,
        spec.encoded,
        asked.sequences,
        asked.over == "topk",
        asked.balance_coef,
        asked.z_coef,
    )
    aux = None
    if options is not None:
        aux = AuxLosses(*(losses.unbind() if spec.aux else (None, None, None)), share)
    return Routing(index, weights, probs, logits, aux, Dispatch(*permutation[-3:], rows, x))


def experts(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    """Fused `reference.experts`. A routing that another router made is permuted first. T > 0."""
    dispatch = routing.dispatch
    if dispatch is None:
        dispatch = Dispatch(*permute_op(routing.index.contiguous(), w1.shape[0]))
    # The gradient of x goes through rows, unless routing saw other tokens (a projection, another dtype), or ran under
    # no_grad: then it goes straight to x.
    rows = dispatch.rows if dispatch.tokens is x and dispatch.rows.requires_grad else None
    tensors = [None if t is None else t.contiguous() for t in (w1, b1, w2, b2)]
    inputs = (x, rows, routing.weights, *tensors)
    store_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    permutation = (dispatch.order, dispatch.inverse, dispatch.offsets)
    y, _ = experts_op(x.contiguous(), rows, routing.weights.float(), *permutation, *tensors, activation, gated, store_z)
    return y


@functools.cache
def decode(spec: str) -> RouterSpec:
    """The RouterSpec whose `encoded` this is."""
    return RouterSpec(**json.loads(spec))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


@torch.library.custom_op("libmoe_fast::triton_dispatch", mutates_args=())
def dispatch_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    noise_weight: Tensor | None,
    learned_temperature: Tensor | None,
    aux_scale: Tensor | None,
    temperature: float,
    spec: str,
    sequences: int,
    over_topk: bool,
    balance_coef: float,
    z_coef: float,
) -> list[Tensor]:
    """[rows, *Routed (those there are), *Permuted, *LossValues]; see kernels/dispatch.py."""
    routed, permuted, values = kernels.dispatch(
        RouterInputs(x, weight, bias, noise, noise_weight, learned_temperature),
        spec=decode(spec),
        temperature=temperature,
        sequences=sequences,
        over_topk=over_topk,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )
    there = [t for t in routed if t is not None]
    return [virtual_rows(x, decode(spec).top_k), *there, *permuted, *values]


def virtual_rows(x: Tensor, top_k: int) -> Tensor:
    """[T*K, D] without memory: one element, seen everywhere."""
    return x.new_empty(1).expand(x.shape[0] * top_k, x.shape[1])


@dispatch_op.register_fake
def _(x, weight, bias, noise, noise_weight, learned_temperature, aux_scale, temperature, spec, sequences, *_options):
    spec = decode(spec)
    T, N, K = x.shape[0], spec.num_experts, spec.top_k
    shapes = kernels.routed_shapes(spec, T, noise is not None)
    routed = [
        x.new_empty(shape, dtype=torch.int64 if name == "index" else torch.float32)
        for name, shape in shapes.items()
        if shape is not None
    ]
    permuted = [x.new_empty(n, dtype=torch.int64) for n in (T * K, T * K, N + 1)]
    values = [x.new_empty(shape, dtype=torch.float32) for shape in (3, N, (sequences, N))]
    return [virtual_rows(x, K), *routed, *permuted, *values]


@torch.library.custom_op("libmoe_fast::triton_dispatch_backward", mutates_args=())
def dispatch_backward_op(
    drows: Tensor | None,
    dweights: Tensor,
    dlosses: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    noise_weight: Tensor | None,
    learned_temperature: Tensor | None,
    aux_scale: Tensor | None,
    routed: list[Tensor],
    inverse: Tensor,
    first_share: Tensor,
    temperature: float,
    spec: str,
    balance_coef: float,
    z_coef: float,
) -> list[Tensor]:
    """[dx, dweight], then dbias, dnoise_weight, dtemperature for those there are."""
    there = iter(routed)
    shapes = kernels.routed_shapes(decode(spec), x.shape[0], noise is not None)
    grads = kernels.dispatch_backward(
        RouterInputs(x, weight, bias, noise, noise_weight, learned_temperature),
        Routed(**{name: None if shape is None else next(there) for name, shape in shapes.items()}),
        inverse,
        first_share,
        dweights=dweights,
        daux=dlosses,  # its first element
        aux_scale=aux_scale,
        dxs=drows,
        spec=decode(spec),
        temperature=temperature,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )
    return [g for g in grads if g is not None]


@dispatch_backward_op.register_fake
def _(drows, dweights, dlosses, x, weight, bias, noise, noise_weight, learned_temperature, *_rest):
    learned = (x, weight, bias, noise_weight if noise is not None else None, learned_temperature)
    return [torch.empty_like(t) for t in learned if t is not None]


def _dispatch_setup(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.spec, _, _, ctx.balance_coef, ctx.z_coef = inputs
    _rows, *routed, order, inverse, offsets, _losses, share, first_share = output
    index, _weights, *others = routed
    ctx.mark_non_differentiable(index, *others, order, inverse, offsets, share, first_share)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *routed, inverse, first_share)


def _dispatch_backward(ctx, grads: list[Tensor | None]):
    drows, _, dweights, *_rest, dlosses, _share, _first_share = grads
    x, weight, bias, noise, noise_weight, temperature, aux_scale, *routed, inverse, first_share = ctx.saved_tensors
    if drows is None and dweights is None and dlosses is None:
        return (None,) * 13
    dx, dweight, *rest = dispatch_backward_op(
        None if drows is None else drows.contiguous(),
        torch.zeros_like(routed[1]) if dweights is None else dweights.contiguous(),
        dlosses,
        x,
        weight,
        bias,
        noise,
        noise_weight,
        temperature,
        aux_scale,
        routed,
        inverse,
        first_share,
        ctx.temperature,
        ctx.spec,
        ctx.balance_coef,
        ctx.z_coef,
    )
    there = [bias is not None, noise is not None and noise_weight is not None, temperature is not None]
    dbias, dnoise_weight, dtemperature = (rest.pop(0) if present else None for present in there)
    return dx, dweight, dbias, None, dnoise_weight, dtemperature, *(None,) * 7


dispatch_op.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)


@torch.library.custom_op("libmoe_fast::triton_permute", mutates_args=())
def permute_op(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, inverse, offsets of choices that another router made."""
    return tuple(kernels.permute(index, num_experts))


@permute_op.register_fake
def _(index, num_experts):
    flat = index.new_empty(index.numel())
    return flat, torch.empty_like(flat), index.new_empty(num_experts + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@torch.library.custom_op("libmoe_fast::triton_experts", mutates_args=())
def experts_op(
    x: Tensor,
    rows: Tensor | None,
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
    store_z: bool,
) -> tuple[Tensor, Tensor]:
    """y [T, O], and z [T*K, H or 2H], empty unless `store_z`. The gradient of x goes to `rows` where there are."""
    expert = ExpertWeights(w1, b1, w2, b2, activation, gated)
    y, z = run_experts(x, weights, Permuted(order, inverse, offsets), expert, store_z=store_z)
    return y, x.new_empty(0) if z is None else z


@experts_op.register_fake
def _(x, rows, weights, order, inverse, offsets, w1, b1, w2, b2, activation, gated, store_z):
    z = x.new_empty(order.shape[0], w1.shape[1]) if store_z else x.new_empty(0)
    return x.new_empty(x.shape[0], w2.shape[1]), z


@torch.library.custom_op("libmoe_fast::triton_experts_backward", mutates_args=())
def experts_backward_op(
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
    sum_over_k: bool,
    weight_grads: bool,
) -> list[Tensor]:
    """[dx [T, D] or, without `sum_over_k`, drows [T*K, D]; dweights [T, K]; dw1, db1, dw2, db2, those there are]."""
    expert = ExpertWeights(w1, b1, w2, b2, activation, gated)
    permuted = Permuted(order, inverse, offsets)
    grads = run_experts_backward(dy, x, weights, permuted, expert, z, weight_grads=weight_grads)
    dx = combine(grads.dxs, inverse, weights.shape[1]) if sum_over_k else grads.dxs
    return [dx, *(g for g in grads[1:] if g is not None)]


@experts_backward_op.register_fake
def _(dy, x, weights, order, inverse, offsets, w1, b1, w2, b2, z, activation, gated, sum_over_k, weight_grads):
    dx = x.new_empty(x.shape[0] if sum_over_k else order.shape[0], x.shape[1])
    params = [p for p in (w1, b1, w2, b2) if p is not None] if weight_grads else []
    return [dx, torch.empty_like(weights), *map(torch.empty_like, params)]


def _experts_setup(ctx, inputs, output) -> None:
    x, rows, *tensors, ctx.activation, ctx.gated, _ = inputs
    _, z = output
    ctx.through_rows = rows is not None
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors, z)


def _experts_backward(ctx, dy: Tensor | None, _dz: None):
    if dy is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on the first read and refuses a second
    weight_grads = any(ctx.needs_input_grad[6:10])
    dx, dweights, *grads = experts_backward_op(
        dy.contiguous(), *saved, ctx.activation, ctx.gated, not ctx.through_rows, weight_grads
    )
    there = [weight_grads and p is not None for p in saved[5:9]]
    dw1, db1, dw2, db2 = (grads.pop(0) if present else None for present in there)
    to_x, to_rows = (None, dx) if ctx.through_rows else (dx, None)
    return to_x, to_rows, dweights, None, None, None, dw1, db1, dw2, db2, None, None, None


experts_op.register_autograd(_experts_backward, setup_context=_experts_setup)
