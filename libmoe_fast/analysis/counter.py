"""Counting the experts that a model chooses: for the images that a LLaVA is shown, or for whatever any model reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from libmoe_fast import MoE, RouterSpec, Routing, moe_layers, record_routing
from libmoe_fast.analysis.counts import GATES, RoutingCounts, image_layers
from libmoe_fast.multiscale import passes


@dataclass(frozen=True)
class ImageRecord:
    """Where the tokens of one image went, or of several.

    Args:
        counts, gates: per layer [N] int64 and [N + 5] float64, see counts.
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
def record_images(
    model: torch.nn.Module, images: int, *, beams: int = 1, outputs: bool = False
) -> Iterator[list[ImageRecord]]:
    """Fills the list it yields, when it is left, with a record of each of the images that the vision tower was shown.

    Inside, the tower is shown `images` images once, in order. Of one that looks at several scales, the image at its own
    size counts, as in LibMoE. No image, or no MoE layer: the list stays empty.

    Args:
        beams: of the beam search that runs inside.
        outputs: also compare the outputs of each token's experts, which takes as many passes more.
    """
    records: list[ImageRecord] = []
    layers = moe_layers(model) if images else {}
    layers = {name: layers[name] for name in image_layers(layers)}
    with record_routing(model) as recorder, comparing_outputs(layers if outputs else {}) as compared:
        yield records
    found = []  # per layer: [images, N], [images, N + 5]
    for name, layer in layers.items():
        seen, scales = recorder.records[name], passes(model, name)
        counts = count_per_image(seen, images, beams=beams, scales=scales)
        gates = gates_per_image(seen, images, layer.router.spec, beams=beams, similarity=compared.get(name))
        chosen = _own_pass(seen[0], images, beams).index.reshape(images, -1, seen[0].index.shape[-1])
        found.append((counts.cpu().numpy(), gates.cpu().numpy(), chosen.to(torch.uint8).cpu().numpy()))
    for i in range(images if found else 0):
        counts, gates, chosen = zip(*((c[i], g[i], e[i]) for c, g, e in found), strict=True)
        records.append(ImageRecord(list(counts), list(gates), list(chosen)))


def count_per_image(seen: Sequence[Routing], images: int, *, beams: int = 1, scales: int = 1) -> torch.Tensor:
    """[images, N] int64: how often each expert of one layer was chosen for the tokens of each image; N as in `probs`,
    and a choice beyond is nobody's.

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
    chosen = first.index.reshape(images, -1).clamp(max=num_experts)  # [images, m * tokens * K]
    row = torch.arange(images, device=chosen.device).unsqueeze(1) * (num_experts + 1)
    counts = torch.bincount((chosen + row).flatten(), minlength=images * (num_experts + 1))
    return counts.view(images, num_experts + 1)[:, :-1]


def _own_pass(routing: Routing, images: int, beams: int) -> Routing:
    """Each image once, where transformers 4 shows it once per beam."""
    step = beams if routing.index.shape[0] == images * beams else 1
    return Routing(*(tensor[::step] for tensor in routing[:3]))


def gates_per_image(
    seen: Sequence[Routing],
    images: int,
    spec: RouterSpec,
    *,
    beams: int = 1,
    similarity: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """[images, N + 5] float64: sums over each image's tokens of the probabilities, 1, their entropy, the margin, and
    of those that were compared, 1 and the similarity.

    similarity: of the tokens, once per pass of `seen`, as comparing_outputs makes it; None: not compared.
    """
    first = _own_pass(seen[0], images, beams)
    p = distribution(first.probs.double(), spec)  # [images * m, tokens, N]
    entropy = -torch.xlogy(p, p).sum(-1, keepdim=True) / math.log(2)
    weights = first.weights.double()
    margin = weights[..., :1] - (weights[..., 1:2] if spec.top_k > 1 else 0)
    if similarity is None:
        alike = torch.full_like(margin, math.nan)
    else:
        alike = similarity[0].view(*seen[0].index.shape[:-1], 1)[:: seen[0].index.shape[0] // first.index.shape[0]]
    compared = alike.isfinite().double()
    every = torch.cat([p, torch.ones_like(entropy), entropy, margin, compared, alike.double().nan_to_num()], dim=-1)
    return every.reshape(images, -1, every.shape[-1]).sum(1)


def distribution(probs: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """A router's p [.., N] as probabilities that sum to 1: sigmoids over their sum, and the softmax of scores."""
    if spec.probability == "identity":
        return probs.softmax(-1)
    return probs / probs.sum(-1, keepdim=True) if spec.probability == "sigmoid" else probs


@contextmanager
def comparing_outputs(layers: Mapping[str, MoE]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, each pass of each layer appends `output_similarity` of its tokens [T] to the layer's list."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def compare(values: list[torch.Tensor], layer: MoE, inputs: tuple) -> None:
        values.append(output_similarity(layer, *inputs))

    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, inputs, name=name: compare(found[name], layers[name], inputs))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def output_similarity(layer: MoE, x: torch.Tensor, routing: Routing, backend: str | None = None) -> torch.Tensor:
    """The cosine of the outputs of two of a token's chosen experts, averaged over all pairs of them, [T] float32: 1
    where they say the same, as right after upcycling. NaN for a token with fewer than two outputs.

    Args:
        x, routing, backend: as Experts.forward takes them.
    """
    ones = torch.ones_like(routing.weights[:, :1])
    each = [
        layer.experts.forward(
            x, Routing(routing.index[:, k : k + 1].contiguous(), ones, free=routing.free), backend
        ).float()
        for k in range(routing.index.shape[1])
    ]
    outputs = torch.stack(each, dim=1)  # [T, K, O]
    norms = outputs.norm(dim=-1, keepdim=True)
    there = (norms > 0).sum((1, 2))  # a choice that is nobody's has no output
    total = (outputs / norms.clamp_min(torch.finfo(torch.float32).tiny)).sum(1).square().sum(-1)  # = there + 2 pairs
    return torch.where(there > 1, (total - there) / (there * (there - 1)).clamp_min(1), math.nan)


@contextmanager
def counting(
    model: torch.nn.Module,
    counts: RoutingCounts,
    task: str,
    categories: Mapping[str, str] | None = None,
    *,
    outputs: bool = False,
) -> Iterator[None]:
    """Adds the choices of all tokens that any model with our layers reads inside to `counts`, as one sample of a task.

        counts = RoutingCounts(list(moe_layers(model)))
        for batch in batches:
            with counting(model, counts, "my-task"):
                model(**batch)
        counts.save("routing.json")  # its tasks, as evaluation's: total_entropy(counts.tasks["my-task"].total.counts)

    Tokens of padding count as others do: give batches without.

    Args:
        categories: what the sample is sorted by, {"subject": "algebra"}.
        outputs: see record_images.
    """
    layers = moe_layers(model)
    with record_routing(model) as recorder, comparing_outputs(layers if outputs else {}) as compared:
        yield
    chosen, gates = [], []
    for name in counts.layers:
        spec, seen = layers[name].router.spec, recorder.records[name]
        passes_over = compared.get(name) or [None] * len(seen)
        slots = seen[0].probs.shape[-1] if seen else spec.num_experts
        chosen.append(torch.zeros(slots, dtype=torch.int64))
        gates.append(torch.zeros(slots + len(GATES), dtype=torch.float64))
        for routing, alike in zip(seen, passes_over, strict=True):
            flat = Routing(*(tensor.reshape(1, -1, tensor.shape[-1]) for tensor in routing[:3]))  # as of one image
            chosen[-1] += count_per_image([flat], 1)[0].cpu()
            gates[-1] += gates_per_image([flat], 1, spec, similarity=None if alike is None else [alike])[0].cpu()
    counts.add(task, categories or {}, [c.numpy() for c in chosen], [g.numpy() for g in gates])
