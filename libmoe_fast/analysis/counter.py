"""Counting the experts that a model chooses for the images it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from libmoe_fast import Routing, record_routing
from libmoe_fast.analysis.counts import RoutingCounts
from libmoe_fast.multiscale import passes


@dataclass(frozen=True)
class ImageOwner:
    """What an image's tokens count for."""

    task: str
    categories: Mapping[str, str]


@contextmanager
def count_experts(
    model: torch.nn.Module, counts: RoutingCounts, images: Sequence[ImageOwner], *, beams: int = 1
) -> Iterator[None]:
    """Adds to `counts` the experts chosen inside, where the vision tower is shown these images once, in this order.

    Of a tower that looks at several scales, the image at its own size counts, as in LibMoE.

    Args:
        images: whose each image is.
        beams: of the beam search that runs inside.
    """
    with record_routing(model) as recorder:
        yield
    if not images or not counts.layers:
        return
    layers = [
        count_per_image(recorder.records[name], len(images), beams=beams, scales=passes(model, name))
        for name in counts.layers
    ]
    layers = [layer.cpu().numpy() for layer in layers]  # each [images, N]
    for i, owner in enumerate(images):
        counts.add(owner.task, owner.categories, [layer[i] for layer in layers])


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
    index, num_experts = seen[0].index, seen[0].probs.shape[-1]
    if index.shape[0] == images * beams:
        index = index[::beams]
    chosen = index.reshape(images, -1)  # [images, m * tokens * K]
    row = torch.arange(images, device=chosen.device).unsqueeze(1) * num_experts
    return torch.bincount((chosen + row).flatten(), minlength=images * num_experts).view(images, num_experts)
