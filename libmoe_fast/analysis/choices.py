"""Which experts each image token was sent to: packed beside the answers, and compared between checkpoints.

A choice takes as many bits as its expert's number needs: for CLIP-L with 4 experts, 2 bits * 577 tokens * 2 choices *
25 layers are 7 kB per image, 17 MB for MME.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from libmoe_fast.analysis.results import ANSWERS, read_results
from libmoe_fast.answers import read_lines

Choices = dict[tuple[str, int], list[np.ndarray]]  # (task, document) -> per layer [tokens, K], best first


def pack(layers: Sequence[np.ndarray], num_experts: Sequence[int]) -> dict[str, Any]:
    """[tokens, K] per layer as JSON-able text.

    Args:
        num_experts: per layer, at most 256; ValueError for more.
    """
    if max(num_experts, default=0) > 256:
        raise ValueError(f"choices among {max(num_experts)} experts do not fit the 8 bits that are kept of each")
    bits = np.concatenate([_to_bits(chosen, n) for chosen, n in zip(layers, num_experts, strict=True)])
    return {
        "shapes": [list(chosen.shape) for chosen in layers],
        "experts": list(num_experts),
        "bits": base64.b64encode(np.packbits(bits).tobytes()).decode(),
    }


def unpack(packed: dict[str, Any]) -> list[np.ndarray]:
    """What `pack` was given, as uint8."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), dtype=np.uint8))
    layers, at = [], 0
    for shape, n in zip(packed["shapes"], packed["experts"], strict=True):
        width = _width(n)
        size = int(np.prod(shape)) * width
        values = np.packbits(bits[at : at + size].reshape(-1, width), axis=1)[:, 0] >> (8 - width)
        layers.append(values.reshape(shape))
        at += size
    return layers


def _width(num_experts: int) -> int:
    return max((num_experts - 1).bit_length(), 1)


def _to_bits(chosen: np.ndarray, num_experts: int) -> np.ndarray:
    return np.unpackbits(chosen.astype(np.uint8).reshape(-1, 1), axis=1)[:, -_width(num_experts) :].ravel()


def read_choices(evaluation: Path) -> Choices:
    """The choices that an evaluation kept with its answers; of a question answered twice, the later ones. Answers of
    another checkpoint, from before this one was trained into the same folder, stay there and are not these.
    """
    run = (read_results(evaluation) or {}).get("answers")
    return {
        (line["task"], line["document"]): unpack(line["choices"])
        for line in read_lines(evaluation / ANSWERS)
        if line.get("choices") and run in (None, line.get("run"))
    }


def coactivation(choices: Choices, task: str, num_experts: Sequence[int]) -> list[np.ndarray]:
    """Per layer [N, N]: how likely a token that chose expert i (row) chose j too; the diagonal is 1.

    NaN in the row of an expert that nothing chose. Even use of K of N experts has (K - 1) / (N - 1) beside the
    diagonal (Lo et al. 2024; OLMoE's co-activation, Muennighoff et al. 2024, section 5.2).

    Args:
        num_experts: of each layer.
    """
    pairs = [np.zeros((n, n)) for n in num_experts]
    for (name, _), layers in choices.items():
        if name == task:
            for counts, chosen in zip(pairs, layers, strict=True):  # chosen [tokens, K]
                hits = np.zeros((len(chosen), len(counts) + 1))  # the last for choices that are nobody's
                np.put_along_axis(hits, np.minimum(chosen.astype(np.int64), len(counts)), 1, axis=1)
                counts += hits[:, :-1].T @ hits[:, :-1]
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of an expert that nothing chose
        return [counts / np.diag(counts)[:, None] for counts in pairs]


def changed(before: Choices, after: Choices, task: str) -> np.ndarray | None:
    """Per layer, the share of slots with another expert than before (LibMoE, figure 4); None: no common document."""
    return _mean_over_tokens(before, after, task, lambda a, b: (a != b).mean(1))


def left(before: Choices, after: Choices, task: str) -> np.ndarray | None:
    """Per layer, 1 - |chosen before and after| / K: the share of chosen experts that changed, whatever their order.

    With the last checkpoint as `after`, 1 - this is the router's saturation (Muennighoff et al. 2024, OLMoE).
    """
    return _mean_over_tokens(
        before, after, task, lambda a, b: 1 - (a[:, :, None] == b[:, None, :]).any(2).mean(1, dtype=np.float64)
    )


def _mean_over_tokens(before: Choices, after: Choices, task: str, measure) -> np.ndarray | None:
    """Over all tokens of the documents that both have; layers have the same number of tokens in both."""
    shared = [key for key in before.keys() & after.keys() if key[0] == task]
    if not shared:
        return None
    layers = zip(*(zip(before[key], after[key], strict=True) for key in shared), strict=True)  # of pairs per document
    return np.array([measure(*(np.concatenate(side) for side in zip(*pairs, strict=True))).mean() for pairs in layers])
