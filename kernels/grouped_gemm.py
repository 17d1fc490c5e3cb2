"""Grouped GEMMs over rows sorted by expert; expert e owns rows offsets[e]:offsets[e+1].

    up     x [T, D] gathered in the load, W1 [N, H, D], b1 -> z = x W1^T + b1, a = act(z)      [T*K, H]
    down   a [T*K, H], W2 [N, O, H], b2                    -> y = a W2^T + b2                  [T*K, O]
    dz     dy [T, O] gathered in the load, W2              -> g = dy W2, and from z: dz, w a, parts of dw
    dx     dz [T*K, H], W1                                 -> dxs = dz W1                      [T*K, D]

Persistent: programs walk over tiles (row tile, column tile), so an expert boundary costs a partly empty tile and never
another expert's K-loop. Rows are read through pointers, since gathered rows cannot use TMA on Hopper; weights through a
3-D descriptor [N, rows, columns] where DESCRIPTOR, whose bounds keep an expert's edge from reading its neighbour.
"""

import triton
import triton.language as tl

from .primitives import (
    activate,
    activation_slope,
    cast,
    count_row_tiles,
    dot,
    find_row_tile,
    gemm_jit,
    halves,
    swizzle,
)

# Columns of a tile that an epilogue takes at a time, so that registers suffice on sm90 under every Triton tried.
UP_COLUMNS, DZ_COLUMNS = tl.constexpr(32), tl.constexpr(16)


@triton.jit
def product(
    acc,
    a_ptr,
    a_rows,
    a_live,
    w,
    expert,
    column,
    C,
    COLUMNS,
    FORWARD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc [BM, BN] + A[a_rows, :C] times columns column..column+BN of an expert's weight.

    FORWARD: w [N, COLUMNS, C], columns are its rows (A W^T); else w [N, C, COLUMNS] (A W). A pointer or a descriptor.
    """
    if not DESCRIPTOR:
        w += expert.to(tl.int64) * C * COLUMNS
    for k0 in range(0, C, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(a_ptr + a_rows[:, None] * C + k[None, :], mask=a_live[:, None] & (k[None, :] < C), other=0.0)
        if FORWARD:
            b = tl.trans(weight_rows(w, expert, column, k0, C, COLUMNS, DESCRIPTOR, BN, BK))
        else:
            if DESCRIPTOR:
                b = tl.reshape(w.load([expert, k0, column]), (BK, BN))
            else:
                n = column + tl.arange(0, BN)
                live = (k[:, None] < C) & (n[None, :] < COLUMNS)
                b = tl.load(w + k[:, None] * COLUMNS + n[None, :], mask=live, other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def weight_rows(w, expert, row, k0, C, ROWS, DESCRIPTOR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] from (row, k0) of an expert's weight [ROWS, C]: a pointer to that one, or a descriptor of all."""
    if DESCRIPTOR:
        return tl.reshape(w.load([expert, row, k0]), (BN, BK))
    else:
        n = row + tl.arange(0, BN)
        k = k0 + tl.arange(0, BK)
        live = (n[:, None] < ROWS) & (k[None, :] < C)
        return tl.load(w + n[:, None] * C + k[None, :], mask=live, other=0.0)


@triton.jit
def two_products(
    z,
    up,
    x_ptr,
    tokens,
    live,
    w1,
    expert,
    h0,
    H,
    D,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """z, up [BM, BN] + X[tokens] times rows h0..h0+BN of an expert's W1 [2H, D] and those H below; x is loaded once."""
    H1 = H * 2
    if not DESCRIPTOR:
        w1 += expert.to(tl.int64) * D * H1
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + tokens[:, None] * D + k[None, :], mask=live[:, None] & (k[None, :] < D), other=0.0)
        gate_rows = weight_rows(w1, expert, h0, k0, D, H1, DESCRIPTOR, BN, BK)
        up_rows = weight_rows(w1, expert, H + h0, k0, D, H1, DESCRIPTOR, BN, BK)
        z = dot(x, tl.trans(gate_rows), z, PRECISION)
        up = dot(x, tl.trans(up_rows), up, PRECISION)
    return z, up


@triton.jit
def starting_at(bias_ptr, first, left, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """What a product is added to [BM, BN]: zero, or the bias from `first` on, for which nobody waits at the end.

    left: as many of its columns are there.
    """
    start = tl.zeros((BM, BN), tl.float32)
    if BIAS:
        n = tl.arange(0, BN)
        start += tl.load(bias_ptr + first + n, mask=n < left, other=0.0).to(tl.float32)[None, :]
    return start


@triton.jit
def columns(tile, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr):
    """[BM, BN] -> its columns, a tuple of [BM, BH]: free, as each thread has whole rows' columns of a product."""
    if BN > BH:
        left, right = halves(tile, BM, BN)
        return columns(left, BM, BN // 2, BH) + columns(right, BM, BN // 2, BH)
    else:
        return (tile,)


@gemm_jit
def up_kernel(
    x_ptr,
    w1,
    b1_ptr,
    order_ptr,
    offsets_ptr,
    z_ptr,
    a_ptr,
    D,
    H,
    rows_log2,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    STORE_Z: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """a = act(x W1^T + b1) for every choice; z is kept if STORE_Z. Gated: W1 [N, 2H, D], a = act(gate) up."""
    H1 = H * 2 if GATED else H  # rows of an expert's W1
    row_tiles = count_row_tiles(offsets_ptr, N, NP, BM)
    column_tiles = tl.cdiv(H, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = swizzle(tile, row_tiles, column_tiles, GROUP)
        expert, first, stop = find_row_tile(row_tile, offsets_ptr, N, NP, BM)
        row = tl.arange(0, BM)
        live = first + row < stop
        tokens = tl.load(order_ptr + first + row, mask=live, other=0) // K  # int64 [BM]
        h0 = column_tile * BN

        z = starting_at(b1_ptr, expert * H1 + h0, H - h0, BIAS, BM, BN)
        up = z
        if GATED:
            up = starting_at(b1_ptr, expert * H1 + H + h0, H - h0, BIAS, BM, BN)
            z, up = two_products(z, up, x_ptr, tokens, live, w1, expert, h0, H, D, DESCRIPTOR, PRECISION, BN, BK)
        else:
            z = product(z, x_ptr, tokens, live, w1, expert, h0, D, H1, True, DESCRIPTOR, PRECISION, BN, BK)
        z_pieces, up_pieces = columns(z, BM, BN, UP_COLUMNS), columns(up, BM, BN, UP_COLUMNS)
        for i in tl.static_range(BN // UP_COLUMNS):
            h = h0 + i * UP_COLUMNS
            up_epilogue(
                z_pieces[i],
                up_pieces[i],
                first,
                row,
                live,
                h,
                z_ptr,
                a_ptr,
                H,
                ACTIVATION,
                FAST,
                GATED,
                STORE_Z,
                UP_COLUMNS,
            )


@triton.jit
def up_epilogue(
    z,
    up,
    first,
    row,
    live,
    h0,
    z_ptr,
    a_ptr,
    H,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
    GATED: tl.constexpr,
    STORE_Z: tl.constexpr,
    BH: tl.constexpr,
):
    """Activation and stores of z (and up) [BM, BH], columns h0..h0+BH of the rows from `first`."""
    H1 = H * 2 if GATED else H
    h = h0 + tl.arange(0, BH)
    mask = live[:, None] & (h[None, :] < H)
    at = row[:, None] * H1 + h[None, :]  # int32: inside the tile's rows
    if STORE_Z:
        tl.store(z_ptr + first * H1 + at, cast(z, z_ptr.dtype.element_ty), mask=mask)
    a = activate(z, ACTIVATION, FAST)
    if GATED:
        if STORE_Z:
            tl.store(z_ptr + first * H1 + H + at, cast(up, z_ptr.dtype.element_ty), mask=mask)
        a = a * up
    tl.store(a_ptr + first * H + row[:, None] * H + h[None, :], cast(a, a_ptr.dtype.element_ty), mask=mask)


@gemm_jit
def down_kernel(
    a_ptr,
    w2,
    b2_ptr,
    offsets_ptr,
    y_ptr,
    H,
    O,
    rows_log2,
    N: tl.constexpr,
    NP: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """y = a W2^T + b2 for every choice; the combine weighs and sums."""
    row_tiles = count_row_tiles(offsets_ptr, N, NP, BM)
    column_tiles = tl.cdiv(O, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = swizzle(tile, row_tiles, column_tiles, GROUP)
        expert, first, stop = find_row_tile(row_tile, offsets_ptr, N, NP, BM)
        row = tl.arange(0, BM)
        live = first + row < stop
        o0 = column_tile * BN
        o = o0 + tl.arange(0, BN)
        y = starting_at(b2_ptr, expert * O + o0, O - o0, BIAS, BM, BN)
        y = product(y, a_ptr + first * H, row, live, w2, expert, o0, H, O, True, DESCRIPTOR, PRECISION, BN, BK)
        mask = live[:, None] & (o[None, :] < O)
        tl.store(y_ptr + first * O + row[:, None] * O + o[None, :], cast(y, y_ptr.dtype.element_ty), mask=mask)


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
        g = product(g, dy_ptr, tokens, live, w2, expert, h0, O, H, False, DESCRIPTOR, PRECISION, BN, BK)
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


@gemm_jit
def dx_kernel(
    dz_ptr,
    w1,
    order_ptr,
    offsets_ptr,
    dw_parts_ptr,
    dx_ptr,
    dweights_ptr,
    D,
    H1,
    rows_log2,
    PARTS: tl.constexpr,
    PARTS_P: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dxs = dz W1 for every choice; its first column of tiles also adds up dw_parts into dweights [T, K]."""
    row_tiles = count_row_tiles(offsets_ptr, N, NP, BM)
    column_tiles = tl.cdiv(D, BN)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = swizzle(tile, row_tiles, column_tiles, GROUP)
        expert, first, stop = find_row_tile(row_tile, offsets_ptr, N, NP, BM)
        row = tl.arange(0, BM)
        live = first + row < stop
        d0 = column_tile * BN
        d = d0 + tl.arange(0, BN)
        dx = tl.zeros((BM, BN), tl.float32)
        dx = product(dx, dz_ptr + first * H1, row, live, w1, expert, d0, H1, D, False, DESCRIPTOR, PRECISION, BN, BK)
        mask = live[:, None] & (d[None, :] < D)
        tl.store(dx_ptr + first * D + row[:, None] * D + d[None, :], cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        if column_tile == 0:
            part = tl.arange(0, PARTS_P)
            parts = tl.load(
                dw_parts_ptr + first * PARTS + row[:, None] * PARTS + part[None, :],
                mask=live[:, None] & (part[None, :] < PARTS),
                other=0.0,
            )
            choice = tl.load(order_ptr + first + row, mask=live, other=0)
            tl.store(dweights_ptr + choice, tl.sum(parts, 1), mask=live)
