"""Weight and bias gradients of the experts: products over an expert's rows, each tile by one program, in row order.

    dW2 [N, O, H] = dy[gathered]^T (w a),  db2 [N, O] = sum of w dy
    dW1 [N, H, D] = dz^T x[gathered],      db1 [N, H] = sum of dz

One side's rows are tokens, gathered through pointers; the other's are sorted, a block at a time through a descriptor
where DESCRIPTOR. An idle expert's rows are none, its loops run zero times, and its gradients are written as zero.
"""

import triton
import triton.language as tl

from .primitives import INTERPRETED, cast, dot, gemm_jit, swizzle

# A program of the bias: its columns, and the rows of a step, so many that loads keep memory busy. Tests have fewer.
DB_COLUMNS, DB_ROWS = tl.constexpr(64), tl.constexpr(16 if INTERPRETED else 128)


@gemm_jit
def weight_grad_kernel(
    left,
    right,
    terms_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    dw_ptr,
    db_ptr,
    M,
    C,
    rows_log2,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    WEIGH_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dw [N, M, C] = sum over an expert's rows r of left[r] (x) right[r]; db [N, M] = sum of terms[r], weighted by w if
    WEIGH_BIAS; terms are left again. The rows of left or right that are gathered are tokens, the other's are sorted.
    Grid: (programs of the bias, first, and tiles of [M, C]; N). BK rows per step.
    """
    tile = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    if BIAS:
        # By programs of their own: sums inside the products' loop would make a few programs those that all wait for.
        if tile < tl.cdiv(M, DB_COLUMNS):
            column = tile * DB_COLUMNS + tl.arange(0, DB_COLUMNS)
            db = bias_grad(terms_ptr, weights_ptr, order_ptr, start, stop, column, M, K, GATHER_LEFT, WEIGH_BIAS)
            tl.store(db_ptr + expert * M + column, cast(db, db_ptr.dtype.element_ty), mask=column < M)
        tile -= tl.cdiv(M, DB_COLUMNS)
    if tile >= 0:
        m_tile, c_tile = swizzle(tile, tl.cdiv(M, BM), tl.cdiv(C, BN), GROUP)
        m = m_tile * BM + tl.arange(0, BM)
        c = c_tile * BN + tl.arange(0, BN)
        dw = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(stop - start, BK)):
            r0 = start + step * BK
            rows = r0 + tl.arange(0, BK)
            live = rows < stop
            tokens = tl.load(order_ptr + rows, mask=live, other=0) // K
            # A block of sorted rows may end in the next expert's: the other side's zeros take them out of the product.
            if DESCRIPTOR and not GATHER_LEFT:
                left_tile = left.load([r0.to(tl.int32), m_tile * BM])
            else:
                left_tile = row_block(left, tokens if GATHER_LEFT else rows, m, live, M)
            if DESCRIPTOR and GATHER_LEFT:
                right_tile = right.load([r0.to(tl.int32), c_tile * BN])
            else:
                right_tile = row_block(right, rows if GATHER_LEFT else tokens, c, live, C)
            dw = dot(tl.trans(left_tile), right_tile, dw, PRECISION)
        mask = (m[:, None] < M) & (c[None, :] < C)
        tl.store(dw_ptr + (expert * M + m[:, None]) * C + c[None, :], cast(dw, dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_grad(
    terms_ptr, weights_ptr, order_ptr, start, stop, columns, M,
    K: tl.constexpr, GATHER: tl.constexpr, WEIGH: tl.constexpr,
):  # fmt: skip
    """Sum of some columns of the terms over rows start..stop, each times its gate weight if WEIGH -> float32."""
    total = tl.zeros((DB_ROWS, DB_COLUMNS), tl.float32)
    for r0 in range(start, stop, DB_ROWS):
        rows = r0 + tl.arange(0, DB_ROWS)
        live = rows < stop
        if GATHER or WEIGH:
            choice = tl.load(order_ptr + rows, mask=live, other=0)
        terms = row_block(terms_ptr, choice // K if GATHER else rows, columns, live, M).to(tl.float32)
        if WEIGH:
            terms *= tl.load(weights_ptr + choice, mask=live, other=0.0)[:, None]
        total += terms
    return tl.sum(total, 0)


@triton.jit
def row_block(ptr, rows, columns, live, C):
    """Rows of a [.., C] tensor, where they are live."""
    mask = live[:, None] & (columns[None, :] < C)
    return tl.load(ptr + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
