"""The `megablocks` backend: routing is `triton`'s, experts are megablocks' grouped GEMMs (arXiv 2211.15841).

    xs = x[order // K] [T*K, D] | z = gmm(xs, w1^T) + b1 | out = gmm(act(z), w2^T) + b2 | y = sum_K w out[inverse]

A second opinion on the experts, in plain autograd around one foreign product: it copies x in sorted order, keeps what
autograd keeps, and waits for the device once, since gmm wants the experts' sizes on the CPU.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from libmoe_fast import reference
from libmoe_fast.errors import BackendError
from libmoe_fast.fused import FusedOps, permuted
from libmoe_fast.spec import Routing

DTYPES = (torch.bfloat16,)  # gmm takes no other
INSTALL = "pip install --no-deps --no-build-isolation megablocks grouped_gemm, with a CUDA compiler"


def missing() -> str | None:
    """What it lacks here, and how to get it; megablocks itself is imported at the first call, as that needs a GPU."""
    if not torch.cuda.is_available():
        return "there is no GPU, and megablocks has no other engine"
    absent = [name for name in ("megablocks", "grouped_gemm") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported; {INSTALL}" if absent else None


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
    """`reference.experts`, deterministic. A routing that another router made is permuted first, by `ops`."""
    gmm = grouped_gemm()
    N = w1.shape[0]
    dispatch = routing.dispatch or permuted(ops, routing, N)
    order, inverse = dispatch.order, dispatch.inverse
    T, K = routing.index.shape
    counts = dispatch.offsets.diff()[:N].cpu()  # waits
    rows = int(counts.sum())  # the rest are choices that no expert runs

    choices = x.unsqueeze(1).expand(T, K, -1).flatten(0, 1)  # [T*K, D]
    xs = Reordered.apply(choices, order, inverse)[:rows]
    z = gmm(xs, w1, counts, trans_b=True)  # [T*K, H or 2H]
    a = reference.activate(z if b1 is None else z + of_rows(b1, counts), activation, gated)  # [T*K, H]
    out = gmm(a, w2, counts, trans_b=True)  # [T*K, O]
    out = out if b2 is None else out + of_rows(b2, counts)
    out = F.pad(out, (0, 0, 0, T * K - rows))
    chosen = Reordered.apply(out, inverse, order).unflatten(0, (T, K))  # [T, K, O]
    dtype = reference.accumulation_dtype(x.dtype)
    return (chosen.to(dtype) * routing.weights.to(dtype).unsqueeze(-1)).sum(1).to(x.dtype)


def grouped_gemm():
    """gmm(a [rows, in], b [N, out, in], rows per expert [N], trans_b=True) -> [rows, out], differentiable."""
    try:
        from megablocks import grouped_gemm_util
    except (ImportError, RuntimeError) as error:  # RuntimeError: its Triton finds no driver
        raise BackendError(f"megablocks cannot be imported here ({error}); {INSTALL}") from error
    if grouped_gemm_util.ops is None:
        raise BackendError(f"megablocks is installed without grouped_gemm; {INSTALL}")
    return grouped_gemm_util.ops.gmm


def of_rows(bias: Tensor, counts: Tensor) -> Tensor:
    """bias [N, H] of the expert of each sorted row, [T*K, H]: a product, whose backward sums without atomics."""
    owner = torch.repeat_interleave(counts).to(bias.device)  # [T*K]
    return F.one_hot(owner, bias.shape[0]).to(bias.dtype) @ bias


class Reordered(torch.autograd.Function):
    """rows[order] for a permutation. Indexing would add up its gradient with atomics, in whatever order."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows[order]

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return Reordered.apply(grad, inverse, order), None, None
