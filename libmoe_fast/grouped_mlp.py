"""Grouped expert MLP over rows sorted by expert: one GEMM per expert and matrix, nothing recomputed.

    forward:   xs = gather(x) -> z = xs W1^T + b1 -> a = act(z) -> ys = a W2^T + b2 -> y = weighted_scatter(ys)
    backward:  g = dys W2 -> dw = <g, a> + <dys, b2>, dz = w g act'(z) -> dW2, db2, dW1, db1 -> dxs = dz W1 -> dx

Backward saves x, z and the routing only: a is recomputed from z, and the gate-weight gradient needs no forward GEMM,
because <dy, W2 a + b2> = <W2^T dy, a> + <dy, b2>. Expert e owns rows offsets[e]:offsets[e+1]; an idle expert owns
none, and its gradients are exactly zero.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from libmoe_fast.reference import accumulation_dtype, activate

aten = torch.ops.aten

# act'(z) * grad, as PyTorch itself computes it for these activations.
ACTIVATION_BACKWARD = {
    "gelu": lambda grad, z: aten.gelu_backward(grad, z),
    "gelu_pytorch_tanh": lambda grad, z: aten.gelu_backward(grad, z, approximate="tanh"),
    "quick_gelu": lambda grad, z: quick_gelu_backward(grad, z),
    "relu": lambda grad, z: aten.threshold_backward(grad, z, 0),
    "silu": lambda grad, z: aten.silu_backward(grad, z),
}


def forward(
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
    """x [T, D], weights [T, K], permutation of the T*K choices -> y [T, O] and the pre-activation z [T*K, H or 2H]."""
    top_k = weights.shape[1]
    xs = torch.ops.libmoe_fast.gather(x, order, top_k)  # [T*K, D]
    z = x.new_empty(xs.shape[0], w1.shape[1])  # [T*K, H or 2H]
    ys = x.new_empty(xs.shape[0], w2.shape[1])  # [T*K, O]
    for e, rows in expert_rows(offsets):
        linear_out(xs[rows], w1[e], None if b1 is None else b1[e], out=z[rows])
        linear_out(activate(z[rows], activation, gated), w2[e], None if b2 is None else b2[e], out=ys[rows])
    return torch.ops.libmoe_fast.weighted_scatter(ys, inverse, top_k, weights), z


def backward(
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
    """dy [T, O] -> [dx, dweights], then, with `weight_grads`, dw1, dw2, and db1, db2 for the biases there are."""
    top_k = weights.shape[1]
    xs = torch.ops.libmoe_fast.gather(x, order, top_k)  # [T*K, D]
    dys = torch.ops.libmoe_fast.gather(dy, order, top_k)  # [T*K, O], not yet weighted
    row_weight = weights.flatten()[order].unsqueeze(1)  # [T*K, 1]
    dxs = torch.empty_like(xs)
    row_dweight = weights.new_empty(order.shape[0])  # [T*K]
    params = [p for p in (w1, w2, b1, b2) if p is not None]
    grads = [torch.zeros_like(p) for p in params] if weight_grads else []

    for e, rows in expert_rows(offsets):
        g = dys[rows] @ w2[e]  # [rows, H]
        a = activate(z[rows], activation, gated)  # [rows, H]
        row_dweight[rows] = dot_rows(g, a)
        if b2 is not None:
            row_dweight[rows] += dys[rows].to(row_dweight.dtype) @ b2[e].to(row_dweight.dtype)
        weight = row_weight[rows].to(x.dtype)
        dz = activation_backward(g.mul_(weight), z[rows], activation, gated)  # [rows, H or 2H]
        torch.mm(dz, w1[e], out=dxs[rows])
        if weight_grads:
            weighted_dys = dys[rows] * weight
            torch.mm(dz.t(), xs[rows], out=grads[0][e])
            torch.mm(weighted_dys.t(), a, out=grads[1][e])
            biases = iter(grads[2:])
            if b1 is not None:
                next(biases)[e] = column_sums(dz)
            if b2 is not None:
                next(biases)[e] = column_sums(weighted_dys)

    dx = torch.ops.libmoe_fast.weighted_scatter(dxs, inverse, top_k)  # [T, D]
    dweights = row_dweight[inverse].view_as(weights)  # [T, K]
    return [dx, dweights, *grads]


def expert_rows(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop > start:
            yield e, slice(start, stop)


def linear_out(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def activation_backward(da: Tensor, z: Tensor, activation: str, gated: bool) -> Tensor:
    """da [rows, H], z [rows, H or 2H] -> dz like z."""
    act_backward = ACTIVATION_BACKWARD[activation]
    if not gated:
        return act_backward(da, z)
    gate, up = z.chunk(2, dim=-1)
    return torch.cat((act_backward(da * up, gate), da * activate(gate, activation, False)), dim=-1)


def quick_gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(1.702 * z)
    return grad * (sigmoid * (1 + 1.702 * z * (1 - sigmoid)))


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product, accumulated in float32 -> [rows]."""
    dtype = accumulation_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def column_sums(rows: Tensor) -> Tensor:
    """Sum over rows, accumulated in float32."""
    return rows.sum(0, dtype=accumulation_dtype(rows.dtype))
