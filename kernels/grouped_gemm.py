"""Grouped GEMMs over rows sorted by expert; expert e owns rows offsets[e]:offsets[e+1].

    up     x [T, D] gathered in the load, W1 [N, H, D], b1 -> z = x W1^T + b1, a = act(z)      [T*K, H]
    down   a [T*K, H], W2 [N, O, H], b2                    -> y = a W2^T + b2                  [T*K, O]
    back   dy [T*K, O] sorted, W2                          -> da = dy W2                       [T*K, H]
           dz [T*K, H], W1                                 -> dxs = dz W1                      [T*K, D]

dz, between the last two, is in dz.py. dy is copied into sorted order, for da and dW2, since TMA, which cannot gather,
is worth more than a copy; of x a copy would cost up what TMA saves. Persistent: programs walk over tiles (row tile,
column tile), so an expert boundary costs a partly empty tile and never another expert's K-loop. But for up, the
programs share the depth of what the last round leaves (last_round.py).
"""

import triton
import triton.language as tl

from .last_round import finish, lower, part_of_depth, part_of_tile, split_last_round
from .primitives import activate, cast, count_row_tiles, find_row_tile, gated_factor, gemm_jit, swizzle
from .products import columns, product, starting_at, two_products

# Columns of a tile that up's epilogue takes at a time, so that registers suffice on sm90 under every Triton tried.
UP_COLUMNS = tl.constexpr(32)


@gemm_jit
def up_kernel(
    x_ptr,
    w1,
    b1_ptr,
    order_ptr,
    offsets_ptr,
    z_ptr,
    a_ptr,
    flags_ptr,
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
    FLAGS: tl.constexpr,
    K_MAJOR: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """a = act(x W1^T + b1) for every choice; z is kept if STORE_Z. Gated: W1 [N, 2H, D], a = act(gate) up."""
    lower(flags_ptr, FLAGS)  # for down
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
            z, up = two_products(
                z, up, x_ptr, tokens, live, w1, expert, h0, H, D, K_MAJOR, DESCRIPTOR, PRECISION, BN, BK
            )
        else:
            z = product(
                z, x_ptr, tokens, live, w1, expert, h0, D, H1, 0, D, K_MAJOR, False, DESCRIPTOR, PRECISION, BM, BN, BK
            )
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
        a = a * gated_factor(up, ACTIVATION)
    tl.store(a_ptr + first * H + row[:, None] * H + h[None, :], cast(a, a_ptr.dtype.element_ty), mask=mask)


@gemm_jit
def down_kernel(
    a,
    w2,
    b2_ptr,
    offsets_ptr,
    y_ptr,
    slots_ptr,
    flags_ptr,
    H,
    O,
    rows_log2,
    N: tl.constexpr,
    NP: tl.constexpr,
    BIAS: tl.constexpr,
    K_MAJOR: tl.constexpr,
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
    whole, parts, items = split_last_round(row_tiles * column_tiles, H, BK)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, part, of = part_of_tile(item, whole, parts)
        row_tile, column_tile = swizzle(tile, row_tiles, column_tiles, GROUP)
        expert, first, stop = find_row_tile(row_tile, offsets_ptr, N, NP, BM)
        row = tl.arange(0, BM)
        live = first + row < stop
        o0 = column_tile * BN
        h0, h1 = part_of_depth(part, of, H, BK)
        y = starting_at(b2_ptr, expert * O + o0, tl.where(part == 0, O - o0, 0), BIAS, BM, BN)
        y = product(y, a, first, live, w2, expert, o0, H, O, h0, h1, K_MAJOR, True, DESCRIPTOR, PRECISION, BM, BN, BK)
        finish(y, y_ptr + first * O, row, live, o0, O, part, of, slots_ptr, flags_ptr, BM, BN)


@gemm_jit
def back_kernel(
    rows,
    w,
    offsets_ptr,
    out_ptr,
    slots_ptr,
    flags_ptr,
    M,
    C,
    rows_log2,
    N: tl.constexpr,
    NP: tl.constexpr,
    K_MAJOR: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """out [T*K, C] = rows W for every choice, W [N, M, C], or if K_MAJOR, that transposed."""
    row_tiles = count_row_tiles(offsets_ptr, N, NP, BM)
    column_tiles = tl.cdiv(C, BN)
    whole, parts, items = split_last_round(row_tiles * column_tiles, M, BK)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, part, of = part_of_tile(item, whole, parts)
        row_tile, column_tile = swizzle(tile, row_tiles, column_tiles, GROUP)
        expert, first, stop = find_row_tile(row_tile, offsets_ptr, N, NP, BM)
        row = tl.arange(0, BM)
        live = first + row < stop
        c0 = column_tile * BN
        m0, m1 = part_of_depth(part, of, M, BK)
        out = tl.zeros((BM, BN), tl.float32)
        out = product(
            out, rows, first, live, w, expert, c0, M, C, m0, m1, K_MAJOR, True, DESCRIPTOR, PRECISION, BM, BN, BK
        )
        finish(out, out_ptr + first * C, row, live, c0, C, part, of, slots_ptr, flags_ptr, BM, BN)
