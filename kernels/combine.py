"""Between tokens and their K choices, sorted by expert. Deterministic, no atomics.

expand    tokens [T, C], order [T*K]                     -> each choice's token  [T*K, C]
combine   rows [T*K, O], inverse [T*K], weights [T, K]   -> each token's K rows, weighted and summed in float32  [T, O]
"""

import triton
import triton.language as tl

from .last_round import lower
from .primitives import cast


@triton.jit
def expand_kernel(
    tokens_ptr,
    order_ptr,
    offsets_ptr,
    out_ptr,
    flags_ptr,
    C,
    N: tl.constexpr,
    K: tl.constexpr,
    FLAGS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    if FLAGS:
        lower(flags_ptr, FLAGS)  # for da and dx
    row = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = row < tl.load(offsets_ptr + N)  # what follows is of no expert
    mask = live[:, None] & (c[None, :] < C)
    token = tl.load(order_ptr + row, mask=live, other=0) // K
    value = tl.load(tokens_ptr + token[:, None] * C + c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * C + c[None, :], value, mask=mask)


@triton.jit
def combine_kernel(
    rows_ptr,
    inverse_ptr,
    weights_ptr,
    y_ptr,
    T,
    O,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    live = t < T
    mask = live[:, None] & (o[None, :] < O)
    y = sum_choices(rows_ptr, inverse_ptr, weights_ptr, t, live, o, O, mask, K, WEIGHTED, BT, BO)
    tl.store(y_ptr + t[:, None] * O + o[None, :], cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_choices(
    rows_ptr,
    inverse_ptr,
    weights_ptr,
    t,
    live,
    o,
    O,
    mask,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """sum over k of (weights[t, k]) rows[inverse[t K + k], o], in the order of k -> [BT, BO] float32."""
    total = tl.zeros((BT, BO), tl.float32)
    for k in range(K):
        row = tl.load(inverse_ptr + t * K + k, mask=live, other=0)
        value = tl.load(rows_ptr + row[:, None] * O + o[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weights_ptr + t * K + k, mask=live, other=0.0)[:, None]
        total += value
    return total
