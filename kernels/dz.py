"""Back through the activation, over rows sorted by expert: all that follows from z, in one pass over it.

    da [T*K, H], z, gate weights w -> dz [T*K, H or 2H], w a [T*K, H] (for dW2), dw [T, K]

A pass of its own, bound by memory: as the epilogue of da's GEMM it took longer, since nothing ran beside it, and its
registers allowed small tiles only.
"""

import triton
import triton.language as tl

from .primitives import INTERPRETED, activate, activation_slope, cast, gated_factor, through_factor

# Rows of a program, and columns of a step at most. Interpreted, programs cost by their number, and columns are few.
DZ_ROWS, DZ_COLUMNS = tl.constexpr(16 if INTERPRETED else 1), 64 if INTERPRETED else 1024


@triton.jit
def dz_kernel(
    da_ptr,
    z_ptr,
    dy_ptr,
    b2_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    dz_ptr,
    wa_ptr,
    dweights_ptr,
    ROWS,
    H,
    O,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BH: tl.constexpr,
):
    """a = act(z), dz = w da act'(z), w a, and dw = <da, a> + <dy, b2>.

    wa may be da's memory: of one type and shape, they lie in threads alike, so who stores an element has loaded it.
    No forward GEMM runs again: <dy, W2 a + b2> = <W2^T dy, a> + <dy, b2>.
    """
    H1 = H * 2 if GATED else H
    row = tl.program_id(0).to(tl.int64) * DZ_ROWS + tl.arange(0, DZ_ROWS)
    live = row < tl.load(offsets_ptr + N)  # what follows is of no expert
    choice = tl.load(order_ptr + row, mask=live, other=0)  # int64 [DZ_ROWS]
    w = tl.load(weights_ptr + choice, mask=live, other=0.0)[:, None]
    dw = tl.zeros((DZ_ROWS, BH), tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        mask = live[:, None] & (h[None, :] < H)
        at = row[:, None] * H + h[None, :]
        at1 = row[:, None] * H1 + h[None, :]
        da = tl.load(da_ptr + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at1, mask=mask, other=0.0).to(tl.float32)
        a = activate(z, ACTIVATION, FAST)
        dz = w * da * activation_slope(z, ACTIVATION, FAST)
        if GATED:
            up = tl.load(z_ptr + at1 + H, mask=mask, other=0.0).to(tl.float32)
            dup = through_factor(w * da * a, up, ACTIVATION)
            tl.store(dz_ptr + at1 + H, cast(dup, dz_ptr.dtype.element_ty), mask=mask)
            factor = gated_factor(up, ACTIVATION)
            dz = dz * factor
            a = a * factor
        tl.store(dz_ptr + at1, cast(dz, dz_ptr.dtype.element_ty), mask=mask)
        tl.store(wa_ptr + at, cast(w * a, wa_ptr.dtype.element_ty), mask=mask)
        dw += da * a
    if BIAS:
        e = tl.arange(0, NP)
        stops = tl.load(offsets_ptr + e + 1, mask=e < N, other=ROWS)
        expert = tl.sum((stops[None, :] <= row[:, None]).to(tl.int32), 1)
        for o0 in range(0, O, BH):
            o = o0 + tl.arange(0, BH)
            mask = live[:, None] & (o[None, :] < O)
            dy = tl.load(dy_ptr + (choice // K)[:, None] * O + o[None, :], mask=mask, other=0.0)
            b2 = tl.load(b2_ptr + expert[:, None] * O + o[None, :], mask=mask, other=0.0)
            dw += dy.to(tl.float32) * b2.to(tl.float32)
    tl.store(dweights_ptr + choice, tl.sum(dw, 1), mask=live)
