"""Routing, backward: from gate-weight gradients and the auxiliary loss to dx, dW, db, dtemperature.

    dweights [T, K], dlosses -> dscore [T, N] -> dx = sum over K of dxs + dscore W (+ norm terms); per block: db, dtemp.
    ddot [T, N]^T x [T, D]  -> dW, in parts of SPLIT tokens, then their sum in order

These are the last three launches of a layer's backward; the sum over K of the experts' dx rides in the first.
"""

import triton
import triton.language as tl

from .combine import sum_choices
from .primitives import cast, dot


@triton.jit
def route_backward_kernel(
    x_ptr,
    w_ptr,
    noise_ptr,
    noise_w_ptr,
    temperature_ptr,
    index_ptr,
    weights_ptr,
    probs_ptr,
    logits_ptr,
    x_norm_ptr,
    w_norm_ptr,
    cosines_ptr,
    noise_scale_ptr,
    first_share_ptr,
    dweights_ptr,
    dlosses_ptr,
    aux_scale_ptr,
    dxs_ptr,
    inverse_ptr,
    dx_ptr,
    ddot_ptr,
    dnoise_ptr,
    dbias_ptr,
    dw_norm_ptr,
    dtemperature_ptr,
    length,
    sequences,
    D,
    temperature,
    tau,
    balance_coef,
    z_coef,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS: tl.constexpr,
    PROBABILITY: tl.constexpr,
    GATE: tl.constexpr,
    NOISE: tl.constexpr,
    LEARNED_TEMPERATURE: tl.constexpr,
    AUX: tl.constexpr,
    ATTACH: tl.constexpr,
    DLOSSES: tl.constexpr,
    HAS_DXS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SLICE: tl.constexpr,
):
    """ddot, dnoise [T, N]; dbias, dw_norm [blocks, N]; dtemperature [blocks].

    Grid: (blocks as in route_kernel, slices of SLICE columns of dx). Each program goes through the scores, the first of
    a block stores their gradients. BN: experts at a time in the products with W.
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(length, BT)
    sequence = block // blocks
    live = (block % blocks) * BT + tl.arange(0, BT) < length
    t0 = sequence.to(tl.int64) * length + (block % blocks) * BT  # what follows it is addressed in 32 bits
    i = tl.arange(0, BT)
    n = tl.arange(0, NP)
    real = n < N
    stored = n < tl.where(tl.program_id(1) == 0, N, 0)
    k = tl.arange(0, KP)
    tn = i[:, None] * N + n[None, :]
    mask = live[:, None] & real[None, :]
    chosen = live[:, None] & (k[None, :] < K)
    tk = i[:, None] * K + k[None, :]

    p = tl.load(probs_ptr + t0 * N + tn, mask=mask, other=0.0)
    logits = tl.load(logits_ptr + t0 * N + tn, mask=mask, other=0.0)
    w = tl.load(weights_ptr + t0 * K + tk, mask=chosen, other=0.0)  # [BT, KP]
    dw = tl.load(dweights_ptr + t0 * K + tk, mask=chosen, other=0.0)

    # Through the gate weights to the chosen p (or s), one choice at a time.
    inner = tl.sum(w * dw, 1)
    dchosen = tl.zeros((BT, NP), tl.float32)
    sum_p = tl.zeros((BT,), tl.float32)
    for j in range(K):
        hit = n[None, :] == tl.load(index_ptr + t0 * K + i * K + j, mask=live, other=0)[:, None]
        w_j = tl.load(weights_ptr + t0 * K + i * K + j, mask=live, other=0.0)
        dw_j = tl.load(dweights_ptr + t0 * K + i * K + j, mask=live, other=0.0)
        if GATE == "softmax":
            value = w_j * (dw_j - inner)
        elif GATE == "sum":
            value = dw_j - inner
            sum_p += tl.sum(tl.where(hit, p, 0.0), 1)
        else:
            value = dw_j
        dchosen += tl.where(hit, value[:, None], 0.0)
    if GATE == "sum":
        dchosen = dchosen / tl.maximum(sum_p, 1.1754943508222875e-38)[:, None]
    dp = dchosen
    if BIAS == "selection":
        dbias = tl.zeros((NP,), tl.float32)
        if GATE == "softmax":  # other gates are made of p: the bias only chooses
            dbias = tl.sum(dchosen, 0)
        tl.store(dbias_ptr + block * N + n, dbias, mask=stored)

    dlogits = tl.zeros((BT, NP), tl.float32)
    if AUX:
        daux = 0.0  # gradients of the aux loss, and of the two that it is made of
        dbalance = 0.0
        dz = 0.0
        if DLOSSES:
            daux += tl.load(dlosses_ptr)
            dbalance += tl.load(dlosses_ptr + 1)
            dz += tl.load(dlosses_ptr + 2)
        if ATTACH:
            daux += tl.load(aux_scale_ptr)
        dbalance += daux * balance_coef
        dz += daux * z_coef
        share = tl.load(first_share_ptr + sequence * N + n, mask=real, other=0.0)
        dp += (dbalance * N / (length * sequences)) * share[None, :]
        padded = tl.where(real[None, :], logits, float("-inf"))
        high = tl.max(padded, 1)
        e = tl.exp(padded - high[:, None])
        total = tl.sum(e, 1)
        z = high + tl.log(total)
        dlogits += (dz * 2.0 / (length * sequences)) * (z / total)[:, None] * e
    if PROBABILITY == "softmax" or PROBABILITY == "softmax_sigmoid":
        if LEARNED_TEMPERATURE:
            temperature = tl.load(temperature_ptr).to(tl.float32)
        dscaled = p * (dp - tl.sum(p * dp, 1)[:, None])
        dlogits += dscaled / temperature
        if LEARNED_TEMPERATURE:
            terms = tl.where(mask, dscaled * logits, 0.0)
            dtemperature = -tl.sum(tl.sum(terms, 1), 0) / (temperature * temperature)
            if tl.program_id(1) == 0:
                tl.store(dtemperature_ptr + block, dtemperature)
    else:
        dlogits += dp
    dscore = dlogits
    if PROBABILITY == "sigmoid" or PROBABILITY == "softmax_sigmoid":
        dscore = dlogits * logits * (1.0 - logits)
    dscore = tl.where(mask, dscore, 0.0)
    if BIAS == "score":
        tl.store(dbias_ptr + block * N + n, tl.sum(dscore, 0), mask=stored)

    dnoise = dscore
    if NOISE == "learned":  # softplus' = 1 - exp(-softplus)
        noise = tl.load(noise_ptr + t0 * N + tn, mask=mask, other=0.0)
        scale = tl.load(noise_scale_ptr + t0 * N + tn, mask=mask, other=0.0)
        dnoise = dscore * noise * (1.0 - tl.exp(-scale))
        tl.store(dnoise_ptr + t0 * N + tn, dnoise, mask=live[:, None] & stored[None, :])
    ddot = dscore
    along_x = tl.zeros((BT,), tl.float32)  # coefficient of x in dx: d norm(x) / dx = x / norm(x)
    if COSINE:
        cosine = tl.load(cosines_ptr + t0 * N + tn, mask=mask, other=0.0)
        x_norm = tl.load(x_norm_ptr + t0 + i, mask=live, other=1.0)
        w_norm = tl.load(w_norm_ptr + n, mask=real, other=1.0)
        ddot = dscore / (x_norm[:, None] * w_norm[None, :])
        length_x = x_norm - tau
        safe = length_x > 1e-12
        along_x = tl.where(safe, -tl.sum(dscore * cosine, 1) / (x_norm * tl.where(safe, length_x, 1.0)), 0.0)
        tl.store(dw_norm_ptr + block * N + n, tl.sum(dscore * cosine, 0), mask=stored)
    tl.store(ddot_ptr + t0 * N + tn, ddot, mask=live[:, None] & stored[None, :])

    if NP > BN:
        tl.debug_barrier()  # what one thread has stored above, others of this program read below
    slice_start = tl.program_id(1) * SLICE
    for d0 in range(slice_start, tl.minimum(slice_start + SLICE, D), BD):
        d = d0 + tl.arange(0, BD)
        at = i[:, None] * D + d[None, :]
        inside_d = live[:, None] & (d[None, :] < D)
        dx = tl.zeros((BT, BD), tl.float32)
        if HAS_DXS:
            dx = sum_choices(dxs_ptr, inverse_ptr + t0 * K, None, i, live, d, D, inside_d, K, False, BT, BD)
        dx = times_weight(dx, ddot, ddot_ptr + t0 * N, w_ptr, i, live, d, D, N, NP, BN)
        if NOISE == "learned":
            dx = times_weight(dx, dnoise, dnoise_ptr + t0 * N, noise_w_ptr, i, live, d, D, N, NP, BN)
        if COSINE:
            x = tl.load(x_ptr + t0 * D + at, mask=inside_d, other=0.0).to(tl.float32)
            dx += along_x[:, None] * x
        tl.store(dx_ptr + t0 * D + at, cast(dx, dx_ptr.dtype.element_ty), mask=inside_d)


@triton.jit
def times_weight(dx, scores, scores_ptr, w_ptr, i, live, d, D, N: tl.constexpr, NP: tl.constexpr, BN: tl.constexpr):
    """dx [BT, BD] + scores [BT, NP] times W [N, D] at columns d.

    With more than BN experts the registers do not hold the operands: BN at a time, of the scores that were stored.
    """
    for n0 in range(0, NP, BN):
        n = n0 + tl.arange(0, BN)
        part = scores
        if NP > BN:
            part = tl.load(scores_ptr + i[:, None] * N + n[None, :], mask=live[:, None] & (n[None, :] < N), other=0.0)
        w = tl.load(w_ptr + n[:, None] * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)
        dx = dot(part, w.to(tl.float32), dx, "ieee")
    return dx


@triton.jit
def router_grad_kernel(
    x_ptr,
    ddot_ptr,
    dnoise_ptr,
    parts_ptr,
    T,
    D,
    N: tl.constexpr,
    NP: tl.constexpr,
    LEARNED_NOISE: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """parts [splits, N or 2N, D] = ddot^T x (then dnoise^T x) over SPLIT tokens. Grid: (tiles of D, splits)."""
    split = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    real = n < N
    grad = tl.zeros((NP, BD), tl.float32)
    noise_grad = tl.zeros((NP, BD), tl.float32)
    for t0 in range(split * SPLIT, tl.minimum(T, (split + 1) * SPLIT), BT):
        t = t0 + tl.arange(0, BT)
        live = t < T
        x = tl.load(x_ptr + t[:, None] * D + d[None, :], mask=live[:, None] & (d[None, :] < D), other=0.0)
        x = x.to(tl.float32)
        tn = t[:, None] * N + n[None, :]
        mask = live[:, None] & real[None, :]
        grad = dot(tl.trans(tl.load(ddot_ptr + tn, mask=mask, other=0.0)), x, grad, "ieee")
        if LEARNED_NOISE:
            noise_grad = dot(tl.trans(tl.load(dnoise_ptr + tn, mask=mask, other=0.0)), x, noise_grad, "ieee")
    base = parts_ptr + split * (N * 2 if LEARNED_NOISE else N) * D
    mask = real[:, None] & (d[None, :] < D)
    tl.store(base + n[:, None] * D + d[None, :], grad, mask=mask)
    if LEARNED_NOISE:
        tl.store(base + (N + n[:, None]) * D + d[None, :], noise_grad, mask=mask)


@triton.jit
def router_reduce_kernel(
    parts_ptr,
    w_ptr,
    w_norm_ptr,
    dw_norm_ptr,
    dbias_parts_ptr,
    dtemperature_parts_ptr,
    dw_ptr,
    dnoise_w_ptr,
    dbias_ptr,
    dtemperature_ptr,
    D,
    blocks,
    splits,
    tau,
    N: tl.constexpr,
    NP: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS: tl.constexpr,
    LEARNED_NOISE: tl.constexpr,
    LEARNED_TEMPERATURE: tl.constexpr,
    BD: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Adds up the parts of dW (and of noise_weight), and, in the first program, those of db and dtemperature."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    real = n < N
    mask = real[:, None] & (d[None, :] < D)
    nd = n[:, None].to(tl.int64) * D + d[None, :]
    rows = N * 2 if LEARNED_NOISE else N
    dw = tl.zeros((NP, BD), tl.float32)
    dnoise_w = tl.zeros((NP, BD), tl.float32)
    for _ in range(splits):
        dw += tl.load(parts_ptr + nd, mask=mask, other=0.0)
        if LEARNED_NOISE:
            dnoise_w += tl.load(parts_ptr + N * D + nd, mask=mask, other=0.0)
        parts_ptr += rows * D
    if COSINE:
        along_w = sum_blocks(dw_norm_ptr, blocks, n, N, BLOCKS)
        w_norm = tl.load(w_norm_ptr + n, mask=real, other=1.0)
        length = w_norm - tau
        safe = length > 1e-12
        along_w = tl.where(safe, -along_w / (w_norm * tl.where(safe, length, 1.0)), 0.0)
        dw += along_w[:, None] * tl.load(w_ptr + nd, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw_ptr + nd, cast(dw, dw_ptr.dtype.element_ty), mask=mask)
    if LEARNED_NOISE:
        tl.store(dnoise_w_ptr + nd, cast(dnoise_w, dnoise_w_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(0) == 0:
        if BIAS:
            dbias = sum_blocks(dbias_parts_ptr, blocks, n, N, BLOCKS)
            tl.store(dbias_ptr + n, cast(dbias, dbias_ptr.dtype.element_ty), mask=real)
        if LEARNED_TEMPERATURE:
            one = tl.arange(0, 1)
            tl.store(dtemperature_ptr + one, sum_blocks(dtemperature_parts_ptr, blocks, one, 1, BLOCKS))


@triton.jit
def sum_blocks(parts_ptr, blocks, n, N: tl.constexpr, BLOCKS: tl.constexpr):
    """parts [blocks, N] added up over the blocks, BLOCKS at a time, in a fixed order -> [NP]."""
    total = tl.zeros(n.shape, tl.float32)
    for b0 in range(0, blocks, BLOCKS):
        b = (b0 + tl.arange(0, BLOCKS))[:, None]
        total += tl.sum(tl.load(parts_ptr + b * N + n, mask=(b < blocks) & (n < N), other=0.0), 0)
    return total
