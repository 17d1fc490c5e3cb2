"""Weight and bias gradients of the experts: products over an expert's rows, each tile by one program, in row order.

    dW2 [N, O, H] = dy[gathered]^T (w a),    db2 [N, O] = sum of w dy
    dW1 [N, H, D] = (x[gathered]^T dz)^T,    db1 [N, H] = sum of dz

The left factor's rows are tokens, gathered through pointers; the right one's are sorted, a block at a time through a
descriptor where DESCRIPTOR. An idle expert's rows are none, its loops run zero times, and its gradients are written as
zero.
"""

import triton
import triton.language as tl

from .primitives import INTERPRETED, cast, dot, gemm_jit, swizzle

# A program of the bias: its columns, and the rows of a step, so many that loads keep memory busy. Tests have fewer.
DB_COLUMNS, DB_ROWS = tl.constexpr(64), tl.constexpr(16 if INTERPRETED else 128)


@gemm_jit
def weight_grad_kernel(
    tokens_ptr,
    ordered,
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
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dw [N, M, C] = sum over an expert's rows r of tokens[r] (x) ordered[r], or that TRANSPOSED; db [N, M] = sum of
    the terms, which are the side whose columns are M: tokens, times w, or ordered if TRANSPOSED.
    Grid: (programs of the bias, first, and tiles of tokens' columns x ordered's columns; N). BK rows per step.
    """
    tile = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    if BIAS:
        # By programs of their own: sums inside the products' loop would make a few programs those that all wait for.
        if tile < tl.cdiv(M, DB_COLUMNS):
            column = tile * DB_COLUMNS + tl.arange(0, DB_COLUMNS)
            db = bias_grad(terms_ptr, weights_ptr, order_ptr, start, stop, column, M, K, not TRANSPOSED)
            tl.store(db_ptr + expert * M + column, cast(db, db_ptr.dtype.element_ty), mask=column < M)
        tile -= tl.cdiv(M, DB_COLUMNS)
    if tile >= 0:
        LEFT = C if TRANSPOSED else M
        RIGHT = M if TRANSPOSED else C
        left_tile, right_tile = swizzle(tile, tl.cdiv(LEFT, BM), tl.cdiv(RIGHT, BN), GROUP)
        left = left_tile * BM + tl.arange(0, BM)
        right = right_tile * BN + tl.arange(0, BN)
        dw = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(stop - start, BK)):
            r0 = start + step * BK
            rows = r0 + tl.arange(0, BK)
            live = rows < stop
            choice = tl.load(order_ptr + rows, mask=live, other=0)
            gathered = row_block(tokens_ptr, choice // K, left, live, LEFT)
            if DESCRIPTOR:
                # The block may end in the next expert's rows: the zeros of `gathered` take them out of the product.
                block = ordered.load([r0.to(tl.int32), right_tile * BN])
            else:
                block = row_block(ordered, rows, right, live, RIGHT)
            dw = dot(tl.trans(gathered), block, dw, PRECISION)
        at = right[None, :] * C + left[:, None] if TRANSPOSED else left[:, None] * C + right[None, :]
        mask = (left[:, None] < LEFT) & (right[None, :] < RIGHT)
        tl.store(dw_ptr + expert * M * C + at, cast(dw, dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_grad(
    terms_ptr, weights_ptr, order_ptr, start, stop, columns, M, K: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Sum of some columns of the terms over rows start..stop -> float32; if TOKENS, gathered, and each times its w."""
    total = tl.zeros((DB_ROWS, DB_COLUMNS), tl.float32)
    for r0 in range(start, stop, DB_ROWS):
        rows = r0 + tl.arange(0, DB_ROWS)
        live = rows < stop
        if TOKENS:
            choice = tl.load(order_ptr + rows, mask=live, other=0)
            terms = row_block(terms_ptr, choice // K, columns, live, M).to(tl.float32)
            terms *= tl.load(weights_ptr + choice, mask=live, other=0.0)[:, None]
        else:
            terms = row_block(terms_ptr, rows, columns, live, M).to(tl.float32)
        total += terms
    return tl.sum(total, 0)


@triton.jit
def row_block(ptr, rows, columns, live, C):
    """Rows of a [.., C] tensor, where they are live."""
    mask = live[:, None] & (columns[None, :] < C)
    return tl.load(ptr + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
