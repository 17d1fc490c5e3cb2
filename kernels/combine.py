"""Combine: each token gathers its K expert rows and sums them, weighted, in float32. Deterministic, no atomics.

rows [T*K, O], inverse [T*K], weights [T, K] -> y [T, O]
"""

import triton
import triton.language as tl

from .primitives import cast


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
