"""Tiles of products of sorted rows and an expert's weight: what the grouped GEMMs are made of.

Rows are read through pointers, since gathered rows cannot use TMA on Hopper; weights through a 3-D descriptor
[N, rows, columns] where DESCRIPTOR, whose bounds keep an expert's edge from reading its neighbour.
"""

import triton
import triton.language as tl

from .primitives import dot, halves


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
    k_first,
    k_stop,
    FORWARD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """acc [BM, BN] + A[a_rows, k_first:k_stop] times columns column..column+BN of an expert's weight.

    FORWARD: w [N, COLUMNS, C], columns are its rows (A W^T); else w [N, C, COLUMNS] (A W). A pointer or a descriptor.
    """
    if not DESCRIPTOR:
        w += expert.to(tl.int64) * C * COLUMNS
    for k0 in range(k_first, k_stop, BK):
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
