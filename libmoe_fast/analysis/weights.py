"""How far experts have moved: from the dense MLP that they were copied from, and from one another."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from libmoe_fast.experts import split_norm, stack_dense
from libmoe_fast.upcycle import moe_layers

WEIGHTS = ("w1", "w2")  # of Experts: their biases are too few to tell


def weight_distances(model: nn.Module, start: Path | None = None) -> dict[str, dict[str, Any]]:
    """Of every MoE layer, relative Frobenius distances of its experts' weights; {} for a dense model.

        since_upcycling  [N]      |W_e - W| / |W|, W the dense weights that all of them started from
        between          [N, N]   |W_e - W_f| / |W|, and without a start over the root mean square of all |W_e|

    Both are sums of squares over the two layers of the MLP. Zero right after upcycling (DeepSeekMoE and OLMoE look at
    experts' similarity so; upcycling: Komatsuzaki et al. 2023).

    Args:
        start: the dense checkpoint that was upcycled. None, or one without such an MLP: no since_upcycling.
    """
    found, dense = {}, _tensors(start)
    for name, layer in moe_layers(model).items():
        stacked = [getattr(layer.experts, weight).detach().double().flatten(1) for weight in WEIGHTS]
        origin = _start(dense, name, gated=layer.experts.gated)
        squares = sum(w.square().sum(1) for w in stacked)  # [N]
        scale = squares.mean()
        if origin is not None:
            origin = [tensor.to(w.device).double().flatten() for tensor, w in zip(origin, stacked, strict=True)]
            scale = sum(w.square().sum() for w in origin)
        between = sum(torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").square() for w in stacked)
        found[name] = {"between": (between / scale).sqrt().tolist()}
        if origin is not None:
            moved = sum((w - first).square().sum(1) for w, first in zip(stacked, origin, strict=True))
            found[name]["since_upcycling"] = (moved / scale).sqrt().tolist()
    return found


Dense = dict[str, tuple[Path, str]]  # plain name -> (file, name there)


def _tensors(folder: Path | None) -> Dense:
    """Where the tensors of a checkpoint are; {} where there is none, or none that can be read."""
    found: Dense = {}
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            found |= {_plain(name): (path, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found


def _start(dense: Dense, layer: str, *, gated: bool) -> list[Tensor] | None:
    """w1 and w2 of the dense MLP in the place of a layer."""
    place, state = f"{_plain(layer)}.", {}
    for name, (path, stored) in dense.items():
        if name.startswith(place):
            with safe_open(path, "pt") as file:
                state[name.removeprefix(place)] = file.get_tensor(stored)
    stacked = stack_dense(split_norm(state)[0], 1, gated=gated) if state else None
    return None if stacked is None else [stacked[weight][0] for weight in WEIGHTS]


def _plain(name: str) -> str:
    """The same for a module's name and for that under which transformers stores a LLaVA's."""
    return name.removeprefix("model.").replace("language_model.model.", "language_model.", 1)
