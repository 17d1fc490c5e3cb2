"""The experts alone, on a routing made before: every engine gets the same choices, gate weights and parameters."""

from __future__ import annotations

import torch
from torch import nn

from libmoe_fast.benchmarks.arena import (
    COPY,
    OURS,
    Arena,
    entrant,
    experts_traffic,
    make_moe,
    peers_for,
    random_tokens,
)
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.limits import copy_of, dense_gemms
from libmoe_fast.benchmarks.measure import Entrant
from libmoe_fast.benchmarks.peers import add_peer
from libmoe_fast.spec import Routing


def build(case: Case, device: torch.device) -> Arena:
    moe = make_moe(case, device)
    x = random_tokens(case, device, features=case.shape.in_features).requires_grad_()
    grad = random_tokens(case, device, features=case.shape.out_features)
    with torch.no_grad():
        made = moe.router(x, backend="reference")
    weights = made.weights.clone().requires_grad_()
    routing = Routing(made.index.clone(), weights, made.probs)
    names, skipped = peers_for(case)
    engines: dict[str, nn.Module] = {OURS: moe.experts}
    engines |= {name: add_peer(moe, name).experts for name in names}
    entrants = {
        name: entrant(case, lambda engine=engine: engine(x, routing), module=engine, inputs=(x, weights), grad=grad)
        for name, engine in engines.items()
    }
    entrants[COPY] = Entrant(copy_of(experts_traffic(case), device))
    return Arena(entrants, "dense GEMM", dense_gemms(case, device), skipped)


def test_experts(case, race):
    race(build, case)
