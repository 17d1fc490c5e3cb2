"""A vision encoder before and after upcycling: dense (the limit), with LibMoE's loop, and with our layers.

Layers of CLIP or SigLIP at their real sizes, with random weights; tokens of whole images; auxiliary losses included.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from libmoe_fast.benchmarks.arena import LOOP, OURS, Arena, entrant
from libmoe_fast.benchmarks.cases import CLIP_TOKENS, SIGLIP, SIGLIP_TOKENS, Case
from libmoe_fast.benchmarks.peers import add_peer
from libmoe_fast.upcycle import moe_layers, upcycle

LAYERS = 2
HEAD_FEATURES = 64


def build(case: Case, device: torch.device) -> Arena:
    dense = VisionLayers(case).to(device, case.torch_dtype)
    tokens = min(SIGLIP_TOKENS if case.shape.name == SIGLIP.name else CLIP_TOKENS, case.tokens)
    shape = (case.tokens // tokens, tokens, case.shape.in_features)  # images, tokens, D
    x = torch.randn(shape, device=device).to(case.torch_dtype).requires_grad_()
    grad = torch.randn(shape, device=device).to(case.torch_dtype)
    ours = upcycled(dense, case)
    models = {OURS: ours, LOOP: with_peer(ours, LOOP), "dense": dense}
    entrants = {
        name: entrant(case, lambda model=model: model(x), module=model, inputs=(x,), grad=grad)
        for name, model in models.items()
    }
    limit = entrants.pop("dense")

    def dense_step() -> None:
        limit.reset()
        limit.run()

    return Arena(entrants, "dense model", lambda: dense_step, {})


class VisionLayers(nn.Module):
    """LAYERS layers of CLIP's or SigLIP's vision model, with MLPs of the case's sizes: [images, tokens, D] -> same."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, SiglipVisionConfig
        from transformers.models.clip.modeling_clip import CLIPEncoder
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        shape = case.shape
        siglip = shape.name == SIGLIP.name
        config = (SiglipVisionConfig if siglip else CLIPVisionConfig)(
            hidden_size=shape.in_features,
            intermediate_size=shape.hidden_features,
            num_hidden_layers=LAYERS,
            num_attention_heads=max(shape.in_features // HEAD_FEATURES, 1),
            hidden_act=shape.activation,
        )
        config._attn_implementation = "sdpa"
        self.encoder = (SiglipEncoder if siglip else CLIPEncoder)(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=x).last_hidden_state


def upcycled(dense: nn.Module, case: Case) -> nn.Module:
    """A copy of `dense` with MoE layers for its MLPs."""
    shape = case.shape
    return upcycle(
        copy.deepcopy(dense),
        router=case.router,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        targets=("vision",),
    )


def with_peer(model: nn.Module, peer: str) -> nn.Module:
    """A copy of an upcycled model whose experts are run by `peer`."""
    model = copy.deepcopy(model)
    for name, moe in moe_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, add_peer(moe, peer))
    return model


def test_encoder(case, race):
    race(case)
