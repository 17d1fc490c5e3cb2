"""Names of tensors: LLaVA's and LibMoE's, and ours.

LLaVA, CuMo, LibMoE                                       Hugging Face LLaVA, ours
model.embed_tokens, model.layers.i, model.norm, lm_head   language model
model.vision_tower.vision_model.*                         vision tower
model.mm_projector.0, .2                                  multi_modal_projector.linear_1, .linear_2
*.moelayer.experts.e.fc1|0, .fc2|2                        *.experts.w1, .w2, .bias1, .bias2: stacked, [N, H, D], ...
*.moelayer.gate, hyper_embedding, hypernet                *.router.weight, .bias, .embedding, .hypernet.*
*.moelayer.expert_embeddings, inp_reduction (XMoE)        *.router.weight, .projection
*.moelayer.experts.e.constant, .wg (MoE++)                *.router.constant, .mix; e comes after the experts and a zero
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from libmoe_fast.upcycle import moe_layers

GATE = {
    "gate.weight": "router.weight",
    "gate.bias": "router.bias",
    "hyper_embedding": "router.embedding",
    "hypernet.0.weight": "router.hypernet.w1",
    "hypernet.0.bias": "router.hypernet.b1",
    "hypernet.2.weight": "router.hypernet.w2",
    "hypernet.2.bias": "router.hypernet.b2",
}
XMOE_GATE = {"expert_embeddings": "router.weight", "inp_reduction.weight": "router.projection.weight"}
CONSTANT = {"constant": "router.constant", "wg.weight": "router.mix"}
CONSTANT_EXPERT = re.compile(r"experts\.(\d+)\.(constant|wg\.weight)")
EXPERT = re.compile(r"experts\.(\d+)\.(fc1|fc2|0|2)\.(weight|bias)")
NUMBER = {"fc1": "1", "0": "1", "fc2": "2", "2": "2"}
PROJECTOR = {"0.": "linear_1.", "2.": "linear_2."}


def prefixes_of(names: Mapping[str, Any]) -> dict[str, str]:
    """LLaVA's prefix -> the model's, which transformers has moved from version to version; the longest first."""

    def before(suffix: str) -> str:
        return next(name for name in names if name.endswith(suffix)).removesuffix(suffix)

    tower = before("embeddings.patch_embedding.weight")
    projector = next(n for n in names if "multi_modal_projector." in n).partition("multi_modal_projector.")[0]
    return {
        "model.vision_tower.vision_tower.vision_model.": tower,  # LLaVA v1.6
        "model.vision_tower.vision_model.": tower,
        "model.mm_projector.": f"{projector}multi_modal_projector.",
        "lm_head.": before("lm_head.weight") + "lm_head.",
        "model.": before("embed_tokens.weight"),
    }


def our_name(name: str, prefixes: Mapping[str, str]) -> tuple[str, int | None]:
    """(name in our model, number of the expert whose part of it this is)."""
    theirs = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if theirs is None:
        return name, None
    prefix, rest = prefixes[theirs], name.removeprefix(theirs)
    before, is_moe, inside = rest.rpartition("moelayer.")
    if is_moe:
        # The projector is the layer itself; in the tower the layer is called mlp.
        layer = prefix if theirs == "model.mm_projector." else f"{prefix}{before}mlp."
        if expert := EXPERT.fullmatch(inside):
            return f"{layer}experts.{'w' if expert[3] == 'weight' else 'bias'}{NUMBER[expert[2]]}", int(expert[1])
        if constant := CONSTANT_EXPERT.fullmatch(inside):
            return layer + CONSTANT[constant[2]], None
        return layer + (GATE | XMOE_GATE).get(inside, inside), None
    if theirs == "model.mm_projector.":
        rest = next((ours + rest.removeprefix(old) for old, ours in PROJECTOR.items() if rest.startswith(old)), rest)
    return prefix + rest, None


def their_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    state = model.state_dict()
    prefixes = {ours: theirs for theirs, ours in prefixes_of(state).items()}
    layers = moe_layers(model)
    gates = GATE | XMOE_GATE if "xmoe" in {layer.router_name for layer in layers.values()} else GATE
    gate = {ours: theirs for theirs, ours in gates.items()}
    linear = {ours: theirs for theirs, ours in PROJECTOR.items()}
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        ours = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len)
        theirs, rest = prefixes[ours], name.removeprefix(ours)
        layer = next((n for n in layers if name.startswith(f"{n}.")), None)
        if layer is None:
            renamed = (there + rest.removeprefix(o) for o, there in linear.items() if rest.startswith(o))
            yield theirs + (next(renamed, rest) if theirs == "model.mm_projector." else rest), tensor
            continue
        inside = name.removeprefix(f"{layer}.")
        place = theirs + rest.removesuffix(inside).removesuffix("mlp.") + "moelayer."
        if constant := next((theirs for theirs, ours in CONSTANT.items() if inside == ours), None):
            slot = layers[layer].experts.num_experts + layers[layer].router.zeros
            yield f"{place}experts.{slot}.{constant}", tensor[0]
            continue
        if not inside.startswith("experts."):
            yield place + gate[inside], tensor[None] if inside == "router.embedding" else tensor
            continue
        number, kind = int(inside[-1]), "bias" if "bias" in inside else "weight"
        linear_name = ("0", "2")[number - 1] if theirs == "model.mm_projector." else f"fc{number}"
        for expert, part in enumerate(tensor.unbind()):
            yield f"{place}experts.{expert}.{linear_name}.{kind}", part.clone()
