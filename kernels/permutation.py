"""Permutation: a stable counting sort of the T*K choices by expert, and the end of the loss sums, in one launch.

    index [T, K], counts [blocks, N] -> offsets [N + 1], order [T*K], inverse [T*K]
    first, prob_sums [blocks, N], z_sums [blocks] -> losses (aux, balance, z), share [N], first_share [S, N]

Each program adds up the counts of the blocks before its own, and ranks its own choices: no atomics, no host sync. A
program takes PER blocks, so that not every block adds up all of them. The last one adds up the loss sums, in a fixed
order.
"""

import triton
import triton.language as tl

from .run import next_power_of_2


@triton.jit
def permute_kernel(
    index_ptr,
    counts_ptr,
    first_ptr,
    prob_sums_ptr,
    z_sums_ptr,
    order_ptr,
    inverse_ptr,
    offsets_ptr,
    losses_ptr,
    share_ptr,
    first_share_ptr,
    length,
    sequences,
    balance_coef,
    z_coef,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    LOSSES: tl.constexpr,
    OVER_TOPK: tl.constexpr,
    BT: tl.constexpr,
    PER: tl.constexpr,
    BLOCKS: tl.constexpr,
    CHOICES: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Grid: one for every PER blocks of route_kernel, and one for the losses.

    Per step BLOCKS, of at most SEQUENCES sequences where that matters, and CHOICES.
    """
    block = tl.program_id(0) * PER  # the first of this program
    per_sequence = tl.cdiv(length, BT)
    blocks = per_sequence * sequences
    n = tl.arange(0, NP)
    real = n < N

    before = tl.zeros((NP,), tl.int64)  # choices per expert in earlier blocks
    total = tl.zeros((NP,), tl.int64)
    for b0 in range(0, blocks, BLOCKS):
        b = b0 + tl.arange(0, BLOCKS)
        counts = tl.load(counts_ptr + b[:, None] * N + n, mask=(b[:, None] < blocks) & real, other=0).to(tl.int64)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(b[:, None] < block, counts, 0), 0)
    start = tl.cumsum(total, 0) - total  # offsets [NP]

    if block < blocks:
        t0 = first_token(block, length, BT)
        choices = (first_token(tl.minimum(block + PER, blocks), length, BT) - t0).to(tl.int32) * K
        place = start + before
        for c0 in range(0, choices, CHOICES):
            c = c0 + tl.arange(0, CHOICES)
            flat = t0 * K + c
            expert = tl.load(index_ptr + flat, mask=c < choices, other=N)  # int64; N matches no real expert
            hit = (expert[:, None] == n[None, :]) & real[None, :]  # [CHOICES, NP]
            rank = tl.cumsum(hit.to(tl.int32), 0).to(tl.int64)
            position = tl.sum(tl.where(hit, place[None, :] + rank - 1, 0), 1)
            tl.store(inverse_ptr + flat, position, mask=c < choices)
            tl.store(order_ptr + position, flat, mask=c < choices)
            place += tl.sum(hit.to(tl.int64), 0)
    else:
        tl.store(offsets_ptr + n, start, mask=real)
        tl.store(offsets_ptr + N, tl.sum(total, 0))
        if LOSSES:
            finish_losses(
                total,
                first_ptr,
                prob_sums_ptr,
                z_sums_ptr,
                losses_ptr,
                share_ptr,
                first_share_ptr,
                length,
                sequences,
                balance_coef,
                z_coef,
                N,
                NP,
                K,
                OVER_TOPK,
                BT,
                BLOCKS,
                SEQUENCES,
            )


@triton.jit
def first_token(block, length, BT: tl.constexpr):
    """Of a block of route_kernel, which never crosses from one sequence to the next; T for the block after the last."""
    per_sequence = tl.cdiv(length, BT)
    return (block // per_sequence).to(tl.int64) * length + (block % per_sequence) * BT


@triton.jit
def finish_losses(
    total,
    first_ptr,
    prob_sums_ptr,
    z_sums_ptr,
    losses_ptr,
    share_ptr,
    first_share_ptr,
    length,
    sequences,
    balance_coef,
    z_coef,
    N: tl.constexpr,
    NP: tl.constexpr,
    K: tl.constexpr,
    OVER_TOPK: tl.constexpr,
    BT: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Loss sums of the blocks -> losses, share, first_share, SEQUENCES at a time. total [NP]: choices per expert."""
    n = tl.arange(0, NP)
    real = n < N
    per_sequence = tl.cdiv(length, BT)
    tl.store(share_ptr + n, total.to(tl.float32) / tl.maximum(tl.sum(total, 0), 1).to(tl.float32), mask=real)
    tokens = length * sequences
    balance = 0.0
    z = 0.0
    for s0 in range(0, sequences, SEQUENCES):
        s = s0 + tl.arange(0, SEQUENCES)[:, None]
        first = tl.zeros((SEQUENCES, NP), tl.int32)
        probs = tl.zeros((SEQUENCES, NP), tl.float32)
        for b0 in range(0, per_sequence, BLOCKS // SEQUENCES):
            inside = b0 + tl.arange(0, BLOCKS // SEQUENCES)[None, :]
            live = (s < sequences) & (inside < per_sequence)
            b = s * per_sequence + inside  # [SEQUENCES, blocks of each]
            at = b[:, :, None] * N + n
            mask = live[:, :, None] & real
            first += tl.sum(tl.load(first_ptr + at, mask=mask, other=0), 1)
            probs += tl.sum(tl.load(prob_sums_ptr + at, mask=mask, other=0.0), 1)
            z += tl.sum(tl.sum(tl.load(z_sums_ptr + b, mask=live, other=0.0), 1), 0)
        share = first.to(tl.float32) / (length * (K if OVER_TOPK else 1))  # f
        tl.store(first_share_ptr + s * N + n, share, mask=(s < sequences) & real)
        balance += tl.sum(tl.sum(share * (probs / length), 1), 0)
    balance = balance * N / sequences
    z = z / tokens
    tl.store(losses_ptr, balance_coef * balance + z_coef * z)
    tl.store(losses_ptr + 1, balance)
    tl.store(losses_ptr + 2, z)


@triton.jit
def count_kernel(
    index_ptr, counts_ptr, choices, N: tl.constexpr, NP: tl.constexpr, BT: tl.constexpr, CHOICES: tl.constexpr
):
    """counts [blocks, N] of blocks of BT choices, for an index that route_kernel did not make."""
    block = tl.program_id(0)
    n = tl.arange(0, NP)
    counts = tl.zeros((NP,), tl.int32)
    for c0 in range(0, BT, CHOICES):
        c = block.to(tl.int64) * BT + c0 + tl.arange(0, CHOICES)
        expert = tl.load(index_ptr + c, mask=c < choices, other=N)
        counts += tl.sum(((expert[:, None] == n[None, :]) & (n < N)[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * N + n, counts, mask=n < N)


def padded_experts(num_experts: int) -> int:
    """N padded to a power of two that tensor cores take."""
    return max(16, next_power_of_2(num_experts))


def choices_per_step(num_experts: int) -> int:
    """Rows of a [choices, N] one-hot that stay in registers."""
    return max(4096 // padded_experts(num_experts), 16)
