"""Routing with something taken away, to see what it was worth."""

import torch
from torch import Tensor, nn

from libmoe_fast.errors import ConfigError
from libmoe_fast.spec import Routing
from libmoe_fast.upcycle import moe_layers


def drop_top1(model: nn.Module) -> nn.Module:
    """Takes each token's first expert away, in every MoE layer of `model`, for good; the others take over its weight.

    How much a score falls tells how far the first expert is a specialist, and how well the others stand in (LibMoE v2).

    Raises:
        ConfigError: no MoE layer, or one with a single expert per token.
    """
    layers = moe_layers(model)
    if not layers:
        raise ConfigError("the model is dense: it has no first experts to take away")
    for name, layer in layers.items():
        if layer.router.spec.top_k < 2:
            raise ConfigError(f"{name} sends each token to one expert: without it, nothing would be left")
        layer.router.register_forward_hook(lambda router, args, routing: without_first(routing))
    return model


def without_first(routing: Routing) -> Routing:
    """index and weights [T, K] -> [T, K - 1]: the sum of a token's weights stays."""
    left = routing.weights[..., 1:]
    weights = left * _ratio(routing.weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True))
    return routing._replace(index=routing.index[..., 1:], weights=weights, dispatch=None)


def _ratio(whole: Tensor, part: Tensor) -> Tensor:
    """whole / part, and 1 where nothing is left to scale."""
    return torch.where(part != 0, whole / torch.where(part != 0, part, 1), 1)
