"""The `triton` backend: the kernels of kernels/ as the torch.library ops of fused.py. Nothing in them waits for the
device.
"""

import torch
from torch import Tensor

from libmoe_fast import fused
from libmoe_fast.kernels import dispatch as kernels
from libmoe_fast.kernels.dispatch import Permuted, Routed, RouterInputs
from libmoe_fast.kernels.experts import ExpertWeights, combine
from libmoe_fast.kernels.experts import experts as run_experts
from libmoe_fast.kernels.experts import experts_backward as run_experts_backward
from libmoe_fast.spec import decode_spec, routed_shapes


@fused.define
def triton_dispatch(
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
    """[rows, *Routed (those there are), *Permuted, *LossValues]; see kernels/dispatch.py. T > 0."""
    routed, permuted, values = kernels.dispatch(
        RouterInputs(x, weight, bias, noise, noise_weight, learned_temperature),
        spec=decode_spec(spec),
        temperature=temperature,
        sequences=sequences,
        over_topk=over_topk,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )
    there = [t for t in routed if t is not None]
    return [fused.virtual_rows(x, decode_spec(spec).top_k), *there, *permuted, *values]


@fused.define
def triton_dispatch_backward(
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
    shapes = routed_shapes(decode_spec(spec), x.shape[0], noise is not None)
    grads = kernels.dispatch_backward(
        RouterInputs(x, weight, bias, noise, noise_weight, learned_temperature),
        Routed(**{name: None if shape is None else next(there) for name, shape in shapes.items()}),
        inverse,
        first_share,
        dweights=dweights,
        dlosses=dlosses,
        aux_scale=aux_scale,
        dxs=drows,
        spec=decode_spec(spec),
        temperature=temperature,
        balance_coef=balance_coef,
        z_coef=z_coef,
    )
    return [g for g in grads if g is not None]


@fused.define
def triton_permute(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, inverse, offsets of choices that another router made. T > 0."""
    return tuple(kernels.permute(index, num_experts))


@fused.define
def triton_experts(
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
    """y [T, O], and z [T*K, H or 2H], empty unless `store_z`. T > 0."""
    expert = ExpertWeights(w1, b1, w2, b2, activation, gated)
    y, z = run_experts(x, weights, Permuted(order, inverse, offsets), expert, store_z=store_z)
    return y, x.new_empty(0, w1.shape[1]) if z is None else z


@fused.define
def triton_experts_backward(
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


OPS = fused.FusedOps(
    dispatch=triton_dispatch,
    dispatch_backward=triton_dispatch_backward,
    experts=triton_experts,
    experts_backward=triton_experts_backward,
    permute=triton_permute,
)
fused.register("triton", OPS)
torch.library.register_fake("libmoe_fast::triton_permute", fused.permute_fake)
