"""Auxiliary losses of a router: load balance (Fedus et al. 2022, eq. 4-6), router z-loss (Zoph et al. 2022, eq. 5)."""

from typing import Literal

import torch
from torch import Tensor


def balance_loss(
    probs: Tensor,
    index: Tensor,
    *,
    sequences: int = 1,
    over: Literal["top1", "topk"] = "top1",
) -> Tensor:
    """N * sum_i f_i P_i, per sequence, averaged over sequences; 1 when tokens and probability spread evenly.

    f_i is the share of tokens that choose expert i: first (`over="top1"`, LibMoE) or among their K (`"topk"`,
    divided by K). P_i is the mean probability of expert i. Gradients flow through P only.

    Args:
        probs: p [T, N].
        index: chosen experts [T, K], best first.
        sequences: how many equally long sequences the T tokens are; 1 takes the whole batch as one.
    Returns: a scalar in the dtype of `probs`; 0 for T = 0.
    """
    tokens, num_experts = probs.shape
    if tokens == 0:
        return probs.sum()
    chosen = index[:, :1] if over == "top1" else index  # [T, 1 or K]
    share = (
        hits(chosen, num_experts).to(probs.dtype).mean(1).view(sequences, -1, num_experts).mean(1)
    )  # f [sequences, N]
    mean_probs = probs.view(sequences, -1, num_experts).mean(1)  # P [sequences, N]
    return num_experts * (share * mean_probs).sum(-1).mean()


def hits(index: Tensor, num_experts: int) -> Tensor:
    """index [T, K] -> [T, K, N] bool: whether a choice is expert i; of a number outside, it is nobody's."""
    return index.unsqueeze(-1) == torch.arange(num_experts, device=index.device)


def z_loss(logits: Tensor) -> Tensor:
    """mean over tokens of logsumexp(logits)^2, logits [T, N] -> scalar; 0 for T = 0."""
    if logits.shape[0] == 0:
        return logits.sum()
    return torch.logsumexp(logits, dim=-1).square().mean()
