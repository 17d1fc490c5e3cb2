"""Token permutation alone: sort the T*K choices by expert, gather the tokens, weight and combine them again."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from libmoe_fast.benchmarks.arena import OURS, Arena, entrant, random_tokens, require, without_extension
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.limits import copy_of


def build(case: Case, device: torch.device) -> Arena:
    """Raises BackendError where our ops cannot run on `device`."""
    require(without_extension(device))
    shape = case.shape
    x = random_tokens(case, device, features=shape.in_features).requires_grad_()
    index = torch.rand(case.tokens, shape.num_experts, device=device).topk(shape.top_k).indices
    weights = torch.rand(case.tokens, shape.top_k, device=device).requires_grad_()
    grad = torch.randn(case.tokens, shape.in_features, device=device).to(case.torch_dtype)
    entrants = {
        name: entrant(
            case,
            lambda function=function: function(x, index, weights, shape.num_experts),
            module=nn.Module(),
            inputs=(x, weights),
            grad=grad,
        )
        for name, function in ((OURS, ours), ("torch sort + index", torch_sort))
    }
    once = (1 + shape.top_k) * x.nbytes  # [T, D] and [T*K, D]
    # Forward gathers and combines; backward does both for gradients, and multiplies [T*K, D] with [T, D] for weights'.
    passes = 5 if case.mode == "fwd+bwd" else 2
    return Arena(entrants, "memory copy", partial(copy_of, passes * once, device), {})


def ours(x: Tensor, index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    order, inverse, _ = torch.ops.libmoe_fast.permute_index(index, num_experts)
    rows = torch.ops.libmoe_fast.gather(x, order, index.shape[1])  # [T*K, D]
    return torch.ops.libmoe_fast.weighted_scatter(rows, inverse, index.shape[1], weights)


def torch_sort(x: Tensor, index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    order = index.flatten().argsort(stable=True)
    rows = x[order // index.shape[1]]  # [T*K, D]
    rows = rows * weights.flatten()[order].unsqueeze(1).to(x.dtype)
    return rows[order.argsort()].view(*index.shape, -1).sum(1)


def test_permutation(case, race):
    race(case)
