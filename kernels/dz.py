"""The gradient at the pre-activation, over rows sorted by expert, with what else follows from z in the same pass.

    dy [T, O] gathered in the load, W2 [N, O, H] -> g = dy W2; from z: dz, w a [T*K, H], parts of dw [T*K, column tiles]

Persistent, like the other grouped GEMMs (grouped_gemm.py).
"""

import triton
import triton.language as tl

from .last_round import lower
from .primitives import activate, activation_slope, cast, count_row_tiles, find_row_tile, gemm_jit, swizzle
from .products import columns, product

# Columns of a tile that the epilogue takes at a time, so that registers suffice on sm90 under every Triton tried.
DZ_COLUMNS = tl.constexpr(16)


@gemm_jit
def dz_kernel(
    dy_ptr,
    w2,
    b2_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    z_ptr,
    dz_ptr,
    wa_ptr,
    dw_parts_ptr,
    flags_ptr,
    H,
    O,
    rows_log2,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    FLAGS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """g = dy W2; from z: a = act(z), dz = w g act'(z), w a (for dW2), and the tile's part of dw = <g, a> + <dy, b2>.

    No forward GEMM runs again: <dy, W2 a + b2> = <W2^T dy, a> + <dy, b2>. dw_parts [T*K, column tiles] are added up, in
    order, by dx_kernel.
    """
    lower(flags_ptr, FLAGS)  # for dx
    # As many pieces of z as there are registers for; the error function takes many.
    SIZE: tl.constexpr = z_ptr.dtype.element_ty.primitive_bitwidth // 16
    AHEAD: tl.constexpr = min(BN // DZ_COLUMNS, (2 if GATED or ACTIVATION == "gelu" else 8) // SIZE)
    row_tiles = count_row_tiles(offsets_ptr, N, NP, BM)
    column_tiles = tl.cdiv(H, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = swizzle(tile, row_tiles, column_tiles, GROUP)
        expert, first, stop = find_row_tile(row_tile, offsets_ptr, N, NP, BM)
        row = tl.arange(0, BM)
        live = first + row < stop
        choice = tl.load(order_ptr + first + row, mask=live, other=0)  # int64 [BM]
        tokens = choice // K
        w = tl.load(weights_ptr + choice, mask=live, other=0.0)  # [BM]
        h0 = column_tile * BN

        # z is on its way while the product runs: else every piece of the epilogue would wait for memory.
        ahead = ()
        for i in tl.static_range(AHEAD):
            ahead += (z_columns(z_ptr, first, row, live, h0 + i * DZ_COLUMNS, H, GATED, DZ_COLUMNS),)
        g = tl.zeros((BM, BN), tl.float32)
        g = product(g, dy_ptr, tokens, live, w2, expert, h0, O, H, 0, O, False, DESCRIPTOR, PRECISION, BN, BK)
        pieces = columns(g, BM, BN, DZ_COLUMNS)
        dw = tl.zeros((BM,), tl.float32)
        for i in tl.static_range(BN // DZ_COLUMNS):
            h = h0 + i * DZ_COLUMNS
            if i + AHEAD < BN // DZ_COLUMNS:
                ahead += (z_columns(z_ptr, first, row, live, h + AHEAD * DZ_COLUMNS, H, GATED, DZ_COLUMNS),)
            z, up = ahead[i]
            dw += dz_epilogue(
                pieces[i], z, up, first, row, live, w, h, dz_ptr, wa_ptr, H, ACTIVATION, FAST, GATED, DZ_COLUMNS
            )
        if BIAS:
            if column_tile == 0:
                dw += rows_dot(dy_ptr, tokens, live, b2_ptr + expert * O, O, BM, BK)
        tl.store(dw_parts_ptr + (first + row) * column_tiles + column_tile, dw, mask=live)


@triton.jit
def z_columns(z_ptr, first, row, live, h0, H, GATED: tl.constexpr, BH: tl.constexpr):
    """z (and up) [BM, BH] as they were stored, columns h0..h0+BH of the rows from `first`."""
    H1 = H * 2 if GATED else H
    h = h0 + tl.arange(0, BH)
    at = z_ptr + first * H1 + row[:, None] * H1 + h[None, :]
    mask = live[:, None] & (h[None, :] < H)
    z = tl.load(at, mask=mask, other=0.0)
    up = z
    if GATED:
        up = tl.load(at + H, mask=mask, other=0.0)
    return z, up


@triton.jit
def dz_epilogue(
    g,
    z,
    up,
    first,
    row,
    live,
    w,
    h0,
    dz_ptr,
    wa_ptr,
    H,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    BH: tl.constexpr,
):
    """Stores dz and w a for g [BM, BH], columns h0..h0+BH of the rows from `first`; returns <g, a> [BM] over them."""
    H1 = H * 2 if GATED else H
    h = h0 + tl.arange(0, BH)
    mask = live[:, None] & (h[None, :] < H)
    at = row[:, None] * H1 + h[None, :]  # int32: inside the tile's rows
    dz_tile = dz_ptr + first * H1
    z = z.to(tl.float32)
    g = tl.where(mask, g, 0.0)
    a = activate(z, ACTIVATION, FAST)
    dz = w[:, None] * g * activation_slope(z, ACTIVATION, FAST)
    if GATED:
        up = up.to(tl.float32)
        tl.store(dz_tile + H + at, cast(w[:, None] * g * a, dz_ptr.dtype.element_ty), mask=mask)
        dz = dz * up
        a = a * up
    tl.store(dz_tile + at, cast(dz, dz_ptr.dtype.element_ty), mask=mask)
    wa_tile = wa_ptr + first * H
    tl.store(wa_tile + row[:, None] * H + h[None, :], cast(w[:, None] * a, wa_ptr.dtype.element_ty), mask=mask)
    return tl.sum(g * a, 1)


@triton.jit
def rows_dot(a_ptr, a_rows, live, vector_ptr, C, BM: tl.constexpr, BK: tl.constexpr):
    """<A[a_rows], vector> [BM] in float32."""
    total = tl.zeros((BM,), tl.float32)
    for k0 in range(0, C, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(a_ptr + a_rows[:, None] * C + k[None, :], mask=live[:, None] & (k[None, :] < C), other=0.0)
        vector = tl.load(vector_ptr + k, mask=k < C, other=0.0)
        total += tl.sum(a.to(tl.float32) * vector.to(tl.float32)[None, :], 1)
    return total
