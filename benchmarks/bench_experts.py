"""The experts alone, on a routing made before: every engine gets the same choices, gate weights and parameters."""

from __future__ import annotations

import torch

from libmoe_fast.benchmarks.arena import Arena, beside_peers, make_moe, random_tokens
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.spec import Routing


def build(case: Case, device: torch.device) -> Arena:
    moe = make_moe(case, device)
    x = random_tokens(case, device, features=case.shape.in_features).requires_grad_()
    with torch.no_grad():
        made = moe.router(x, backend="reference")
    weights = made.weights.clone().requires_grad_()
    routing = Routing(made.index.clone(), weights, made.probs)
    return beside_peers(case, moe, part=lambda layer: layer.experts, arguments=(x, routing), inputs=(x, weights))


def test_experts(case, race):
    race(case)
