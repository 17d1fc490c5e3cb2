"""Counting the experts that a model chooses for the images it is shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from libmoe_fast import RouterSpec, Routing, moe_layers, record_routing
from libmoe_fast.analysis.counts import image_layers
from libmoe_fast.multiscale import passes


@dataclass(frozen=True)
class ImageRecord:
    """Where the tokens of one image went, or of several.

    Args:
        counts, gates: per layer [N] int64 and [N + 3] float64, see counts.
        chosen: per layer [tokens, K] uint8, best first; of several images, one after the other.
    """

    counts: list[np.ndarray]
    gates: list[np.ndarray]
    chosen: list[np.ndarray]

    def __add__(self, other: ImageRecord) -> ImageRecord:
        return ImageRecord(
            [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)],
            [mine + theirs for mine, theirs in zip(self.gates, other.gates, strict=True)],
            [np.concatenate(pair) for pair in zip(self.chosen, other.chosen, strict=True)],
        )


@contextmanager
def record_images(model: torch.nn.Module, images: int, *, beams: int = 1) -> Iterator[list[ImageRecord]]:
    """Fills the list it yields, when it is left, with a record of each of the images that the vision tower was shown.

    Inside, the tower is shown `images` images once, in order. Of one that looks at several scales, the image at its own
    size counts, as in LibMoE. No image, or no MoE layer: the list stays empty.

    Args:
        beams: of the beam search that runs inside.
    """
    records: list[ImageRecord] = []
    layers = moe_layers(model) if images else {}
    layers = {name: layers[name] for name in image_layers(layers)}
    with record_routing(model) as recorder:
        yield records
    found = []  # per layer: [images, N], [images, N + 3]
    for name, layer in layers.items():
        seen, scales = recorder.records[name], passes(model, name)
        counts = count_per_image(seen, images, beams=beams, scales=scales)
        gates = gates_per_image(seen, images, layer.router.spec, beams=beams)
        chosen = _own_pass(seen[0], images, beams).index.reshape(images, -1, seen[0].index.shape[-1])
        found.append((counts.cpu().numpy(), gates.cpu().numpy(), chosen.to(torch.uint8).cpu().numpy()))
    for i in range(images if found else 0):
        counts, gates, chosen = zip(*((c[i], g[i], e[i]) for c, g, e in found), strict=True)
        records.append(ImageRecord(list(counts), list(gates), list(chosen)))


def count_per_image(seen: Sequence[Routing], images: int, *, beams: int = 1, scales: int = 1) -> torch.Tensor:
    """[images, N] int64: how often each expert of one layer was chosen for the tokens of each image.

    Args:
        seen: the layer's routing, index [images * m, tokens, K], where m consecutive rows are one image's; once per
            scale, of which the first counts.
        beams: transformers 4 shows the vision tower each image once per beam (m = beams); those count once.

    Raises:
        RuntimeError: the layer did not run exactly once per scale.
    """
    if len(seen) != scales:
        raise RuntimeError(f"a vision layer ran {len(seen)} times, expected {scales}")
    first = _own_pass(seen[0], images, beams)
    num_experts = first.probs.shape[-1]
    chosen = first.index.reshape(images, -1)  # [images, m * tokens * K]
    row = torch.arange(images, device=chosen.device).unsqueeze(1) * num_experts
    return torch.bincount((chosen + row).flatten(), minlength=images * num_experts).view(images, num_experts)


def _own_pass(routing: Routing, images: int, beams: int) -> Routing:
    """Each image once, where transformers 4 shows it once per beam."""
    step = beams if routing.index.shape[0] == images * beams else 1
    return Routing(*(tensor[::step] for tensor in routing[:3]))


def gates_per_image(seen: Sequence[Routing], images: int, spec: RouterSpec, *, beams: int = 1) -> torch.Tensor:
    """[images, N + 3] float64: sums over each image's tokens of the probabilities, 1, their entropy, and the margin."""
    first = _own_pass(seen[0], images, beams)
    p = distribution(first.probs.double(), spec)  # [images * m, tokens, N]
    entropy = -torch.xlogy(p, p).sum(-1, keepdim=True) / math.log(2)
    weights = first.weights.double()
    margin = weights[..., :1] - (weights[..., 1:2] if spec.top_k > 1 else 0)
    every = torch.cat([p, torch.ones_like(entropy), entropy, margin], dim=-1)
    return every.reshape(images, -1, every.shape[-1]).sum(1)


def distribution(probs: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """A router's p [.., N] as probabilities that sum to 1: sigmoids over their sum, and the softmax of scores."""
    if spec.probability == "identity":
        return probs.softmax(-1)
    return probs / probs.sum(-1, keepdim=True) if spec.probability == "sigmoid" else probs
