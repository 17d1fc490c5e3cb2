"""How evenly experts are used (LibMoE, arXiv 2411.00918, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def layer_entropy(counts: Sequence[int] | np.ndarray) -> float:
    """H^(l) of eq. 4: Shannon entropy, in bits, of one layer's expert-selection frequencies.

    Args:
        counts: [N], how often each expert was chosen.

    Returns:
        0 when one expert takes every token, log2(N) when all are chosen equally often.

    Raises:
        ValueError: nothing was counted, so that no frequency exists.
    """
    share = _shares(counts)
    share = share[share > 0]  # p log p -> 0
    return float(-(share * np.log2(share)).sum()) + 0.0  # + 0.0: no negative zero


def total_entropy(counts: Sequence[Sequence[int] | np.ndarray]) -> float:
    """H_total of eq. 5: the mean of H^(l) over L layers; `counts`: one [N] sequence per layer."""
    if not len(counts):
        raise ValueError("no layer was counted: a dense model has no H_total")
    return float(np.mean([layer_entropy(c) for c in counts]))


def load_imbalance(counts: Sequence[Sequence[int] | np.ndarray]) -> float:
    """The busiest expert's load over the mean load, averaged over layers: 1 is even, N / K is the worst for top-K."""
    if not len(counts):
        raise ValueError("no layer was counted: a dense model has no load imbalance")
    return float(np.mean([len(c) * _shares(c).max() for c in counts]))


def _shares(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum()
    if counts.ndim != 1 or total <= 0:
        raise ValueError(f"expected the counts of one layer, at least one of them above 0, got {counts.tolist()}")
    return counts / total
