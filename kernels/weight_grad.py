"""Weight and bias gradients of the experts: products over an expert's rows, each tile by one program, in row order.

    dW2 [N, O, H] = dy^T (w a),   db2 [N, O] = sum of w dy       dy sorted
    dW1 [N, H, D] = dz^T x,       db1 [N, H] = sum of dz         x sorted

Both factors are sorted rows, read a block at a time, through descriptors where DESCRIPTOR: to gather tokens inside of
the loop cost more than to copy them first. An idle expert's rows are none, its loops run zero times, and its gradients
are written as zero.
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
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dw [N, M, C] = left^T right over each expert's rows, left [T*K, M], right [T*K, C]; db [N, M] = sum of the terms,
    which are left, times w if WEIGHTED. Grid: (programs of the bias, first, and tiles; N). BK rows per step.
    """
    tile = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    if BIAS:
        # By programs of their own: sums inside the products' loop would make a few programs those that all wait for.
        if tile < tl.cdiv(M, DB_COLUMNS):
            column = tile * DB_COLUMNS + tl.arange(0, DB_COLUMNS)
            db = bias_grad(terms_ptr, weights_ptr, order_ptr, start, stop, column, M, WEIGHTED)
            tl.store(db_ptr + expert * M + column, cast(db, db_ptr.dtype.element_ty), mask=column < M)
        tile -= tl.cdiv(M, DB_COLUMNS)
    if tile >= 0:
        left_tile, right_tile = swizzle(tile, tl.cdiv(M, BM), tl.cdiv(C, BN), GROUP)
        m, c = left_tile * BM, right_tile * BN
        steps = (stop - start) // BK
        dw = tl.zeros((BM, BN), tl.float32)
        for step in range(steps):
            r0 = start + step * BK
            a = row_block(left, r0, stop, m, M, False, DESCRIPTOR, BK, BM)
            b = row_block(right, r0, stop, c, C, False, DESCRIPTOR, BK, BN)
            dw = dot(tl.trans(a), b, dw, PRECISION)
        r0 = start + steps * BK
        if r0 < stop:
            a = row_block(left, r0, stop, m, M, True, DESCRIPTOR, BK, BM)
            b = row_block(right, r0, stop, c, C, True, DESCRIPTOR, BK, BN)
            dw = dot(tl.trans(a), b, dw, PRECISION)
        row, column = m + tl.arange(0, BM), c + tl.arange(0, BN)
        at = row[:, None] * C + column[None, :]
        mask = (row[:, None] < M) & (column[None, :] < C)
        tl.store(dw_ptr + expert * M * C + at, cast(dw, dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_grad(terms_ptr, weights_ptr, order_ptr, start, stop, columns, M, WEIGHTED: tl.constexpr):
    """Sum of some columns of the terms over rows start..stop -> float32; if WEIGHTED, each times its w."""
    total = tl.zeros((DB_ROWS, DB_COLUMNS), tl.float32)
    for r0 in range(start, stop, DB_ROWS):
        rows = r0 + tl.arange(0, DB_ROWS)
        live = rows < stop
        mask = live[:, None] & (columns[None, :] < M)
        terms = tl.load(terms_ptr + rows[:, None] * M + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            choice = tl.load(order_ptr + rows, mask=live, other=0)
            terms *= tl.load(weights_ptr + choice, mask=live, other=0.0)[:, None]
        total += terms
    return tl.sum(total, 0)


@triton.jit
def row_block(
    source, r0, stop, column, COLUMNS, LAST: tl.constexpr, DESCRIPTOR: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """[BK, BC] of rows from r0, columns from `column`. LAST: zero from row `stop` on, another's or unwritten."""
    live = r0 + tl.arange(0, BK) < stop
    if DESCRIPTOR:
        block = source.load([r0.to(tl.int32), column])
        return tl.where(live[:, None], block, 0.0) if LAST else block
    else:
        c = column + tl.arange(0, BC)
        at = source + r0 * COLUMNS + tl.arange(0, BK)[:, None] * COLUMNS + c[None, :]
        mask = c[None, :] < COLUMNS
        return tl.load(at, mask=mask & live[:, None] if LAST else mask, other=0.0)
