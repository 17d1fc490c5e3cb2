"""Auxiliary losses against hand-computed values and their known extremes."""

import math

import pytest
import torch

from libmoe_fast.losses import balance_loss, z_loss


def test_balance_by_hand():
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    index = probs.argsort(descending=True)
    # whole batch: f = (3/4, 1/4), P = (0.6, 0.4) -> 2 (0.45 + 0.1) = 1.1
    torch.testing.assert_close(balance_loss(probs, index).item(), 1.1)
    # two sequences: f = (1, 0), P = (.65, .35) -> 1.3; f = (.5, .5), P = (.55, .45) -> 1; their mean 1.15
    torch.testing.assert_close(balance_loss(probs, index, sequences=2).item(), 1.15)
    # f over both of K = 2 choices, divided by K, is (1/2, 1/2) -> 2 * 0.5 = 1
    torch.testing.assert_close(balance_loss(probs, index, over="topk").item(), 1.0)


@pytest.mark.parametrize("num_experts", [2, 6])  # even, and not a power of two
def test_balance_extremes(num_experts):
    """1 when all is even, N when one expert takes everything."""
    uniform = torch.full((12, num_experts), 1 / num_experts)
    spread = (torch.arange(12) % num_experts).unsqueeze(1)
    torch.testing.assert_close(balance_loss(uniform, spread).item(), 1.0)
    one = torch.eye(num_experts)[torch.zeros(12, dtype=torch.long)]
    torch.testing.assert_close(balance_loss(one, torch.zeros(12, 1, dtype=torch.long)).item(), float(num_experts))


def test_balance_gradient_is_share_times_n():
    """d balance / d p_ti = N f_i / T: gradients flow through P, not through the counts."""
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]], requires_grad=True)
    balance_loss(probs, probs.argsort(descending=True)).backward()
    torch.testing.assert_close(probs.grad, torch.tensor([[2 * 0.75 / 4, 2 * 0.25 / 4]]).expand(4, 2))


def test_z_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])  # logsumexp: ln 2 and ln 4
    torch.testing.assert_close(z_loss(logits).item(), (math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_no_tokens_no_loss():
    empty = torch.empty(0, 4, requires_grad=True)
    total = balance_loss(empty, torch.empty(0, 2, dtype=torch.long)) + z_loss(empty)
    total.backward()
    assert total.item() == 0
    assert empty.grad.shape == (0, 4)
