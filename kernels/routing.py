"""Routing, forward: scores, norms, probabilities, top-K, gate weights and loss statistics in one pass over x.

    x [T, D], W [N, D] -> dot [BT, N], norms -> score -> p -> s -> top-K of s -> index, weights [T, K]
                                                                             -> counts, sums of p, z per block

A block is BT tokens of one sequence. What the losses and the permutation need of it is written per block and added
up by permutation.py, in block order: no atomics, the same bits on every run.
"""

import triton
import triton.language as tl

from .primitives import dot


@triton.jit
def route_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
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
    counts_ptr,
    first_ptr,
    prob_sums_ptr,
    z_sums_ptr,
    length,
    D,
    temperature,
    noise_std,
    tau,
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
    OVER_TOPK: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: blocks of BT tokens, cdiv(length, BT) per sequence of `length` tokens. NP, KP: padded N, K.

    counts, first [blocks, N] int32: choices and counted-for-balance choices; prob_sums [blocks, N], z_sums [blocks].
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(length, BT)
    live = (block % blocks) * BT + tl.arange(0, BT) < length
    t0 = (block // blocks).to(tl.int64) * length + (block % blocks) * BT  # what follows it is addressed in 32 bits
    i = tl.arange(0, BT)
    n = tl.arange(0, NP)
    real = n < N

    score = tl.zeros((BT, NP), tl.float32)
    noise_scale = tl.zeros((BT, NP), tl.float32)
    x_square = tl.zeros((BT,), tl.float32)
    w_square = tl.zeros((NP,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        x = tl.load(x_ptr + t0 * D + i[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0)  # [BT, BD]
        w = tl.load(w_ptr + n[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0)  # [NP, BD]
        score = score_dot(x, w, score)
        if COSINE:
            x_square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            w_square += tl.sum(w.to(tl.float32) * w.to(tl.float32), 1)
        if NOISE == "learned":
            w = tl.load(noise_w_ptr + n[:, None] * D + d, mask=real[:, None] & (d < D), other=0.0)
            noise_scale = score_dot(x, w, noise_scale)

    tn = i[:, None] * N + n[None, :]
    mask = live[:, None] & real[None, :]
    if COSINE:
        x_norm = tl.maximum(tl.sqrt(x_square) + tau, 1e-12)
        w_norm = tl.maximum(tl.sqrt(w_square) + tau, 1e-12)
        score = score / (x_norm[:, None] * w_norm[None, :])
        tl.store(cosines_ptr + t0 * N + tn, score, mask=mask)
        tl.store(x_norm_ptr + t0 + i, x_norm, mask=live)
        if block == 0:
            tl.store(w_norm_ptr + n, w_norm, mask=real)
    if BIAS != "none":
        bias = tl.load(bias_ptr + n, mask=real, other=0.0).to(tl.float32)
    if BIAS == "score":
        score += bias[None, :]
    if NOISE != "off":
        noise = tl.load(noise_ptr + t0 * N + tn, mask=mask, other=0.0)
        if NOISE == "learned":  # softplus, as F.softplus: linear above 20
            noise_scale = tl.where(noise_scale > 20.0, noise_scale, tl.log(1.0 + tl.exp(noise_scale)))
            tl.store(noise_scale_ptr + t0 * N + tn, noise_scale, mask=mask)
            score += noise * noise_scale
        else:
            score += noise * noise_std

    logits = score
    if PROBABILITY == "sigmoid" or PROBABILITY == "softmax_sigmoid":
        logits = tl.sigmoid(score)
    padded = tl.where(real[None, :], logits, float("-inf"))
    if LEARNED_TEMPERATURE:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    if PROBABILITY == "softmax" or PROBABILITY == "softmax_sigmoid":
        scaled = padded / temperature
        p = tl.exp(scaled - tl.max(scaled, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
    else:
        p = tl.where(real[None, :], logits, 0.0)
    s = p
    if BIAS == "selection":
        s += bias[None, :]
    tl.store(logits_ptr + t0 * N + tn, logits, mask=mask)
    tl.store(probs_ptr + t0 * N + tn, p, mask=mask)

    # Top-K by K maxima. NaN and -inf become the lowest finite score: any row yields K different experts.
    left = tl.where((s == s) & (s > -3.0e38), s, -3.0e38)
    left = tl.where(real[None, :], left, float("-inf"))
    k = tl.arange(0, KP)
    index = tl.zeros((BT, KP), tl.int32)
    chosen_s = tl.full((BT, KP), float("-inf"), tl.float32)
    chosen_p = tl.zeros((BT, KP), tl.float32)
    counts = tl.zeros((NP,), tl.int32)
    first = tl.zeros((NP,), tl.int32)
    for j in range(K):
        _, best = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        hit = n[None, :] == best[:, None]  # [BT, NP]
        here = k[None, :] == j
        index = tl.where(here, best[:, None], index)
        chosen_s = tl.where(here, tl.sum(tl.where(hit, s, 0.0), 1)[:, None], chosen_s)
        chosen_p = tl.where(here, tl.sum(tl.where(hit, p, 0.0), 1)[:, None], chosen_p)
        left = tl.where(hit, float("-inf"), left)
        hits = tl.sum((hit & live[:, None]).to(tl.int32), 0)
        counts += hits
        if OVER_TOPK or j == 0:
            first += hits

    if GATE == "softmax":
        weights = tl.exp(chosen_s - tl.max(chosen_s, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
    elif GATE == "sum":
        weights = chosen_p / tl.maximum(tl.sum(chosen_p, 1), 1.1754943508222875e-38)[:, None]
    else:
        weights = chosen_p
    tk = i[:, None] * K + k[None, :]
    tl.store(index_ptr + t0 * K + tk, index.to(tl.int64), mask=live[:, None] & (k < K))
    tl.store(weights_ptr + t0 * K + tk, weights, mask=live[:, None] & (k < K))

    tl.store(counts_ptr + block * N + n, counts, mask=real)
    tl.store(first_ptr + block * N + n, first, mask=real)
    tl.store(prob_sums_ptr + block * N + n, tl.sum(tl.where(live[:, None], p, 0.0), 0), mask=real)
    high = tl.max(padded, 1)
    z = high + tl.log(tl.sum(tl.exp(padded - high[:, None]), 1))  # logsumexp [BT]
    tl.store(z_sums_ptr + block, tl.sum(tl.where(live, z * z, 0.0), 0))


@triton.jit
def score_dot(x, w, acc):
    """acc + x w^T with exact products: bf16 as they are, float32 in IEEE precision, never tf32."""
    if x.dtype == w.dtype:
        return dot(x, tl.trans(w), acc, "ieee")
    else:
        return dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), acc, "ieee")
