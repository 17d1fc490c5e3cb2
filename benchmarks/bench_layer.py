"""The whole layer, router and losses included. Peers run the same router in plain PyTorch, then their experts."""

from __future__ import annotations

import torch

from libmoe_fast.benchmarks.arena import Arena, beside_peers, make_moe, random_tokens
from libmoe_fast.benchmarks.cases import Case


def build(case: Case, device: torch.device) -> Arena:
    x = random_tokens(case, device, features=case.shape.in_features).requires_grad_()
    return beside_peers(case, make_moe(case, device), part=lambda layer: layer, arguments=(x,), inputs=(x,))


def test_layer(case, race):
    race(case)
