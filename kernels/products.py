"""Tiles of products of sorted rows and an expert's weight: what the grouped GEMMs are made of.

Where DESCRIPTOR, weights are read through a 3-D one [N, rows, columns], whose bounds keep an expert's edge from reading
its neighbour; sorted rows through a 2-D one; gathered rows through pointers, since TMA cannot gather on Hopper.
"""

import triton
import triton.language as tl

from .primitives import dot, halves


@triton.jit
def product(
    acc,
    a,
    rows,
    live,
    w,
    expert,
    column,
    C,
    COLUMNS,
    k_first,
    k_stop,
    K_MAJOR: tl.constexpr,
    SORTED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc [BM, BN] + A[rows, k_first:k_stop] W, columns column..column+BN of it. w: see weight_block.

    SORTED: rows is the first of BM, and a is a descriptor where w is one: it reads past an expert's rows, for no one.
    """
    if not DESCRIPTOR:
        w += expert.to(tl.int64) * C * COLUMNS
        if SORTED:
            a += rows * C
            rows = tl.arange(0, BM)
    for k0 in range(k_first, k_stop, BK):
        k = k0 + tl.arange(0, BK)
        if SORTED and DESCRIPTOR:
            left = a.load([rows.to(tl.int32), k0])
        else:
            left = tl.load(a + rows[:, None] * C + k[None, :], mask=live[:, None] & (k[None, :] < C), other=0.0)
        b = weight_block(w, expert, column, k0, C, COLUMNS, K_MAJOR, DESCRIPTOR, BN, BK)
        acc = dot(left, b, acc, PRECISION)
    return acc


@triton.jit
def weight_block(
    w,
    expert,
    column,
    k0,
    C,
    COLUMNS,
    K_MAJOR: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """[BK, BN] of W [C, COLUMNS] from (k0, column). w: a descriptor of all experts' weights [N, C, COLUMNS], or if
    K_MAJOR, [N, COLUMNS, C]; or a pointer to this one's.
    """
    n = column + tl.arange(0, BN)
    k = k0 + tl.arange(0, BK)
    if K_MAJOR:
        if DESCRIPTOR:
            rows = tl.reshape(w.load([expert, column, k0]), (BN, BK))
        else:
            mask = (n[:, None] < COLUMNS) & (k[None, :] < C)
            rows = tl.load(w + n[:, None] * C + k[None, :], mask=mask, other=0.0)
        return tl.trans(rows)
    else:
        if DESCRIPTOR:
            return tl.reshape(w.load([expert, k0, column]), (BK, BN))
        else:
            mask = (k[:, None] < C) & (n[None, :] < COLUMNS)
            return tl.load(w + k[:, None] * COLUMNS + n[None, :], mask=mask, other=0.0)


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
    K_MAJOR: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """z, up [BM, BN] + X[tokens] W1, columns h0..h0+BN of it and those H further on; x is loaded once."""
    H1 = H * 2
    if not DESCRIPTOR:
        w1 += expert.to(tl.int64) * D * H1
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + tokens[:, None] * D + k[None, :], mask=live[:, None] & (k[None, :] < D), other=0.0)
        gate = weight_block(w1, expert, h0, k0, D, H1, K_MAJOR, DESCRIPTOR, BN, BK)
        factor = weight_block(w1, expert, H + h0, k0, D, H1, K_MAJOR, DESCRIPTOR, BN, BK)
        z = dot(x, gate, z, PRECISION)
        up = dot(x, factor, up, PRECISION)
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
