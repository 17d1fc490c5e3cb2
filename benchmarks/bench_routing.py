"""Routing alone: scores, top-K, gate weights and auxiliary losses, against a copy of the tokens.

Ours, where it is fused, makes the permutation as well.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from libmoe_fast import ops
from libmoe_fast.benchmarks.arena import OURS, Arena, entrant, random_tokens
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.limits import copy_of
from libmoe_fast.benchmarks.peers import widen
from libmoe_fast.routers import build_router
from libmoe_fast.spec import LossOptions


def build(case: Case, device: torch.device) -> Arena:
    shape = case.shape
    options = {"device": device, "dtype": case.torch_dtype}
    router = build_router(case.router, shape.in_features, shape.num_experts, shape.top_k, **options)
    x = random_tokens(case, device, features=shape.in_features).requires_grad_()
    grad = torch.randn(case.tokens, shape.top_k, device=device)  # of the gate weights
    losses = LossOptions(balance_coef=0.01, z_coef=0.001, aux_scale=torch.ones((), device=device))
    backend = ops.choose_backend(None, device, case.torch_dtype)
    calls = {OURS: lambda: route(router, x, losses, backend)}
    if backend != "reference":  # which is that very code
        calls["plain PyTorch"] = lambda: route(router, *widen(router, (x,)), losses, "reference")
    entrants = {name: entrant(case, call, module=router, inputs=(x,), grad=grad) for name, call in calls.items()}
    passes = 3 if case.mode == "fwd+bwd" else 1  # x; x again, and its gradient
    return Arena(entrants, "memory copy", partial(copy_of, passes * x.nbytes, device), {})


def route(router: nn.Module, x: Tensor, losses: LossOptions, backend: str) -> Tensor:
    """The gate weights, with the auxiliary losses attached in training."""
    options = losses if router.training else None
    routing = router(x, backend=backend, loss_options=options)
    return (routing if options is None else ops.with_losses(routing, options, router.spec)).weights


def test_routing(case, race):
    race(case)
