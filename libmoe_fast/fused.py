"""What the fused backends share: one pair of ops, their fakes and autograd, and the way into them.

    dispatch  x, router -> rows, index, gate weights, auxiliary losses, permutation     backward: dx, drouter
    experts   rows, gate weights, experts -> y                                          backward: drows, dexperts

`rows` [T*K, D] carries the gradient of x from the experts to the routing, whose backward sums it over K while it adds
its own: no [T, D] tensor between the two, one pass less, and one rounding (`reference` rounds both parts: in float16
it overflows where only their sum is in range). A backend defines the five ops of `FusedOps` with these schemas
(cpu_backend.py in C++, triton_backend.py in Triton) and hands them to `register`.

On a GPU a small layer is done before Python has launched it, so what stands between Python and a kernel is kept thin:
torch.library's own wrappers (custom_op, register_autograd) take 0.1 to 0.4 ms per op, `define` and `register` less.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from libmoe_fast.errors import BackendError
from libmoe_fast.reference import accumulation_dtype
from libmoe_fast.spec import AuxLosses, Dispatch, LossOptions, RouterSpec, Routing, decode_spec, routed_shapes


@dataclass(frozen=True, kw_only=True)
class FusedOps:
    """The ops of one backend.

    dispatch(x, weight, bias?, noise?, noise_weight?, learned_temperature?, aux_scale?, float temperature, str spec,
             int sequences, bool over_topk, float balance_coef, float z_coef)
        -> [rows, *routed (see spec.routed_shapes), order, inverse, offsets, losses [3], share [N],
            first_share [sequences, N]]; losses are aux, balance, z
    dispatch_backward(drows?, dweights, dlosses?, x, weight, bias?, noise?, noise_weight?, learned_temperature?,
             aux_scale?, routed[], inverse, first_share, float temperature, str spec, float balance_coef, float z_coef)
        -> [dx, dweight], then dbias, dnoise_weight, dtemperature for those there are
    experts(x, rows?, weights, order, inverse, offsets, w1, b1?, w2, b2?, str activation, bool gated, bool store_z)
        -> y [T, O], and z [T*K, H or 2H], [0, H or 2H] unless store_z. The gradient of x goes to `rows`, if given.
        With a dispatch that was counted, z and drows have as many rows as order
    experts_backward(dy, x, weights, order, inverse, offsets, w1, b1?, w2, b2?, z, str activation, bool gated,
             bool sum_over_k, bool weight_grads)
        -> [dx [T, D] or, without sum_over_k, drows [T*K, D]; dweights [T, K]; dw1, db1, dw2, db2, those there are]
    permute(index, int num_experts) -> order, inverse, offsets
    """

    dispatch: Callable
    dispatch_backward: Callable
    experts: Callable
    experts_backward: Callable
    permute: Callable


def route(
    ops: FusedOps,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    spec: RouterSpec,
    temperature: Tensor | float,
    noise: Tensor | None,
    noise_weight: Tensor | None,
    options: LossOptions | None,
) -> Routing:
    """`reference.route`, with the auxiliary losses and the dispatch."""
    learned = isinstance(temperature, Tensor)
    asked = options or LossOptions(0.0, 0.0)
    rows, index, weights, probs, logits, *permutation, losses, share, _ = ops.dispatch(
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
    ops: FusedOps,
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
    """`reference.experts`. A routing that another router made is permuted first."""
    dispatch = routing.dispatch or permuted(ops, routing, w1.shape[0])
    # The gradient of x goes through rows, unless routing saw other tokens (a projection, another dtype), or ran under
    # no_grad: then it goes straight to x.
    rows = dispatch.rows if dispatch.tokens is x and dispatch.rows.requires_grad else None
    tensors = [None if t is None else t.contiguous() for t in (w1, b1, w2, b2)]
    weights = routing.weights.to(accumulation_dtype(x.dtype))
    store_z = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, rows, weights, *tensors))
    permutation = (dispatch.order, dispatch.inverse, dispatch.offsets)
    y, _ = ops.experts(x.contiguous(), rows, weights, *permutation, *tensors, activation, gated, store_z)
    return y


def permuted(ops: FusedOps, routing: Routing, num_experts: int) -> Dispatch:
    return Dispatch(*ops.permute(routing.index.contiguous(), num_experts + routing.free))


def counted(dispatch: Dispatch, num_experts: int) -> Dispatch:
    """With as many sorted rows as there are choices that an expert runs, and one that stands for all the others. Waits
    for the device."""
    order, inverse, offsets = dispatch[:3]
    rows = min(int(offsets[num_experts]) + 1, order.shape[0])
    return Dispatch(order[:rows], inverse.clamp_max(rows - 1), offsets.clamp_max(rows))


def virtual_rows(x: Tensor, top_k: int) -> Tensor:
    """[T*K, D] without memory: one element, seen everywhere."""
    return x.new_empty(1).expand(x.shape[0] * top_k, x.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# Fakes


def _dispatch_fake(
    x, weight, bias, noise, noise_weight, learned_temperature, aux_scale, temperature, spec, sequences, *_options
):
    spec = decode_spec(spec)
    T, N, K = x.shape[0], spec.num_experts, spec.top_k
    real = accumulation_dtype(x.dtype)
    routed = [
        x.new_empty(shape, dtype=torch.int64 if name == "index" else real)
        for name, shape in routed_shapes(spec, T, noise is not None).items()
        if shape is not None
    ]
    permuted = [x.new_empty(n, dtype=torch.int64) for n in (T * K, T * K, N + 1)]
    values = [x.new_empty(shape, dtype=real) for shape in (3, N, (sequences, N))]
    return [virtual_rows(x, K), *routed, *permuted, *values]


def _dispatch_backward_fake(
    drows, dweights, dlosses, x, weight, bias, noise, noise_weight, learned_temperature, *_rest
):
    learned = (x, weight, bias, noise_weight if noise is not None else None, learned_temperature)
    return [torch.empty_like(t) for t in learned if t is not None]


def _experts_fake(x, rows, weights, order, inverse, offsets, w1, b1, w2, b2, activation, gated, store_z):
    z = x.new_empty(order.shape[0] if store_z else 0, w1.shape[1])
    return x.new_empty(x.shape[0], w2.shape[1]), z


def _experts_backward_fake(
    dy, x, weights, order, inverse, offsets, w1, b1, w2, b2, z, activation, gated, sum_over_k, weight_grads
):
    dx = x.new_empty(x.shape[0] if sum_over_k else order.shape[0], x.shape[1])
    params = [p for p in (w1, b1, w2, b2) if p is not None] if weight_grads else []
    return [dx, torch.empty_like(weights), *map(torch.empty_like, params)]


def permute_fake(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.new_empty(index.numel())
    return flat, torch.empty_like(flat), index.new_empty(num_experts + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Operations, for torch.utils.flop_counter: a multiplication and an addition are two


def _dispatch_flops(x, weight, *_rest, **_options) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _dispatch_backward_flops(drows, dweights, dlosses, x, weight, *_rest, **_options) -> int:
    return 2 * _dispatch_flops(x, weight)  # of x and of the gate


def _experts_flops(x, rows, weights, order, inverse, offsets, w1, b1, w2, *_rest, **_options) -> int:
    return 2 * order[0] * (w1[1] * w1[2] + w2[1] * w2[2])


def _experts_backward_flops(
    dy, x, weights, order, inverse, offsets, w1, b1, w2, b2, z, activation, gated, sum_over_k, weight_grads, **_options
) -> int:
    forward = _experts_flops(x, None, weights, order, inverse, offsets, w1, b1, w2)
    return 2 * forward if weight_grads else forward


FLOPS = {
    "dispatch": _dispatch_flops,
    "dispatch_backward": _dispatch_backward_flops,
    "experts": _experts_flops,
    "experts_backward": _experts_backward_flops,
}
REGISTERED: list[str] = []  # prefixes of the ops that are there


def tell_flop_counter() -> None:
    """Gives torch.utils.flop_counter the formulas of the ops that are there; on request: its import takes a while."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for prefix in REGISTERED:
        for name, formula in FLOPS.items():
            op = getattr(torch.ops.libmoe_fast, f"{prefix}_{name}")
            if op not in flop_registry:
                register_flop_formula(op)(formula)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _dispatch_setup(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.spec, _, _, ctx.balance_coef, ctx.z_coef = inputs
    _rows, *routed, order, inverse, offsets, _losses, share, first_share = output
    index, _weights, *others = routed
    ctx.mark_non_differentiable(index, *others, order, inverse, offsets, share, first_share)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *routed, inverse, first_share)


def _dispatch_backward(ops: FusedOps, ctx, *grads: Tensor | None):
    drows, _, dweights, *_rest, dlosses, _share, _first_share = grads
    x, weight, bias, noise, noise_weight, temperature, aux_scale, *routed, inverse, first_share = ctx.saved_tensors
    if drows is None and dweights is None and dlosses is None:
        return (None,) * 13
    dx, dweight, *rest = ops.dispatch_backward(
        None if drows is None else drows.contiguous(),
        torch.zeros_like(routed[1]) if dweights is None else dweights.contiguous(),
        None if dlosses is None else dlosses.contiguous(),
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


def _experts_setup(ctx, inputs, output) -> None:
    x, rows, *tensors, ctx.activation, ctx.gated, ctx.keeps_z = inputs
    _, z = output
    ctx.through_rows = rows is not None
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors, z)


def _experts_backward(ops: FusedOps, ctx, dy: Tensor | None, _dz: None):
    if dy is None:
        return (None,) * 13
    if not ctx.keeps_z:
        raise RuntimeError("experts were called with store_z=False, which has no backward; call with store_z=True")
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes on the first read and refuses a second
    weight_grads = any(ctx.needs_input_grad[7:11])  # of w1, b1, w2, b2; the first is no input of the op
    dx, dweights, *grads = ops.experts_backward(
        dy.contiguous(), *saved, ctx.activation, ctx.gated, not ctx.through_rows, weight_grads
    )
    there = [weight_grads and p is not None for p in saved[5:9]]
    dw1, db1, dw2, db2 = (grads.pop(0) if present else None for present in there)
    to_x, to_rows = (None, dx) if ctx.through_rows else (dx, None)
    return to_x, to_rows, dweights, None, None, None, dw1, db1, dw2, db2, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Definition

TWICE = """\
the fused backends are not differentiable twice (gradient penalties, Hessians); backend='reference' is: pass it to \
upcycle or MoE, or set LIBMOE_FAST_BACKEND=reference"""


class NotTwice(torch.autograd.Function):
    """A gradient as it is. torch's once_differentiable lets one pass silently whose own gradient is a constant."""

    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise BackendError(TWICE)


LIBRARY = torch.library.Library("libmoe_fast", "FRAGMENT")


def define(function: Callable) -> Callable:
    """The op libmoe_fast::<name of the function>, its schema read from the annotations. Its result aliases nothing."""
    LIBRARY.define(function.__name__ + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.libmoe_fast, function.__name__).default


def differentiable(op, setup: Callable, backward: Callable) -> Callable:
    """What autograd does for an op: `setup(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs."""

    def run_forward(ctx, keys, *inputs):
        output = below(keys, *inputs)
        setup(ctx, inputs, output)
        return tuple(output)

    def run_backward(ctx, *grads):
        with torch.no_grad():
            made = backward(ctx, *grads)
        if torch.is_grad_enabled():  # create_graph: whoever differentiates these again must not get zeros
            made = (t if t is None else NotTwice.apply(t.requires_grad_()) for t in made)
        return None, *made

    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"
    members = {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)}
    name = op.name().replace("::", "_")  # of its node in a graph, and in a profile
    function = type(name, (torch.autograd.Function,), members)

    def below(keys, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def autograd(keys, *inputs):
        if not (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)):
            return below(keys, *inputs)
        output = function.apply(keys, *inputs)
        return list(output) if returns_list else output

    return autograd


def register(prefix: str, ops: FusedOps) -> None:
    """Gives the ops libmoe_fast::{prefix}_dispatch, .._experts, and their backwards, fakes and autograd."""
    fakes = {
        "dispatch": _dispatch_fake,
        "dispatch_backward": _dispatch_backward_fake,
        "experts": _experts_fake,
        "experts_backward": _experts_backward_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"libmoe_fast::{prefix}_{name}", fake)
    REGISTERED.append(prefix)

    learning = {
        "dispatch": differentiable(ops.dispatch, _dispatch_setup, functools.partial(_dispatch_backward, ops)),
        "experts": differentiable(ops.experts, _experts_setup, functools.partial(_experts_backward, ops)),
    }
    for name, autograd in learning.items():
        LIBRARY.impl(f"{prefix}_{name}", autograd, "Autograd", with_keyset=True)
