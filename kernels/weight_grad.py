"""Weight and bias gradients of the experts: products over an expert's rows, each tile by one program, in row order.

    dW2 [N, O, H] = dy[gathered]^T (w a),  db2 [N, O] = sum of w dy
    dW1 [N, H, D] = dz^T x[gathered],      db1 [N, H] = sum of dz

An idle expert's rows are none, its loop runs zero times, and its gradient is written as zero.
"""

import triton.language as tl

from .primitives import cast, dot, gemm_jit, swizzle


@gemm_jit
def weight_grad_kernel(
    left_ptr,
    right_ptr,
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
    GATHER_RIGHT: tl.constexpr,
    WEIGH_BIAS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """dw [N, M, C] = sum over an expert's rows r of left[r] (x) right[r]; db [N, M] = sum of left[r], weighted by w if
    WEIGH_BIAS. A gathered side is indexed by token, else by row. Grid: (tiles of [M, C], N). BK rows per step.
    """
    expert = tl.program_id(1).to(tl.int64)
    m_tile, c_tile = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(C, BN), GROUP)
    start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    m = m_tile * BM + tl.arange(0, BM)
    c = c_tile * BN + tl.arange(0, BN)

    dw = tl.zeros((BM, BN), tl.float32)
    db = tl.zeros((BM,), tl.float32)
    for r0 in range(start, stop, BK):
        rows = r0 + tl.arange(0, BK)
        live = rows < stop
        left_rows = rows
        right_rows = rows
        if GATHER_LEFT or GATHER_RIGHT or WEIGH_BIAS:
            choice = tl.load(order_ptr + rows, mask=live, other=0)
            if GATHER_LEFT:
                left_rows = choice // K
            if GATHER_RIGHT:
                right_rows = choice // K
        left = tl.load(left_ptr + left_rows[:, None] * M + m[None, :], mask=live[:, None] & (m[None, :] < M), other=0.0)
        right = tl.load(
            right_ptr + right_rows[:, None] * C + c[None, :], mask=live[:, None] & (c[None, :] < C), other=0.0
        )
        dw = dot(tl.trans(left), right, dw, PRECISION)
        if BIAS:
            if c_tile == 0:
                # Loaded again. A value that feeds the dot and other arithmetic gets a buffer too few in shared memory:
                # the next rows are copied into the one that sm90's wgmma still reads (triton issue 6691; see race.py).
                again = left_ptr + left_rows[:, None] * M + m[None, :]
                terms = tl.load(again, mask=live[:, None] & (m[None, :] < M), other=0.0).to(tl.float32)
                if WEIGH_BIAS:
                    terms = terms * tl.load(weights_ptr + choice, mask=live, other=0.0)[:, None]
                db += tl.sum(terms, 0)

    mask = (m[:, None] < M) & (c[None, :] < C)
    tl.store(dw_ptr + (expert * M + m[:, None]) * C + c[None, :], cast(dw, dw_ptr.dtype.element_ty), mask=mask)
    if BIAS:
        if c_tile == 0:
            tl.store(db_ptr + expert * M + m, cast(db, db_ptr.dtype.element_ty), mask=m < M)
