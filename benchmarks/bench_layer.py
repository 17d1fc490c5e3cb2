"""The whole layer, router and losses included. Peers run the same router in plain PyTorch, then their experts."""

from __future__ import annotations

import torch

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


def build(case: Case, device: torch.device) -> Arena:
    moe = make_moe(case, device)
    x = random_tokens(case, device, features=case.shape.in_features).requires_grad_()
    grad = random_tokens(case, device, features=case.shape.out_features)
    names, skipped = peers_for(case)
    layers = {OURS: moe} | {name: add_peer(moe, name) for name in names}
    entrants = {
        name: entrant(case, lambda layer=layer: layer(x), module=layer, inputs=(x,), grad=grad)
        for name, layer in layers.items()
    }
    if not case.sweep:
        entrants[COPY] = Entrant(copy_of(experts_traffic(case), device))
    return Arena(entrants, "dense GEMM", dense_gemms(case, device), skipped)


def test_layer(case, race):
    race(build, case)
