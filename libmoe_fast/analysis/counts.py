"""Where image tokens went: per layer, per task, and per category of the task's documents.

Two arrays per layer: `counts` [N], how often each expert was chosen, and `gates` [N + 5], sums over tokens: the gate
probabilities of all experts, then GATES: the tokens themselves, the entropies of their probabilities in bits, the
margins of their gate weights (first minus second), and of the tokens whose experts' outputs were compared, their number
and their similarities (see counter.output_similarity).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from libmoe_fast.errors import DataError
from libmoe_fast.files import write_atomically

FORMAT = 3
GATES = ("tokens", "entropy", "margin", "compared", "similarity")  # what follows the N probabilities in `gates`


def image_layers(names: Iterable[str]) -> list[str]:
    """Those of a LLaVA's MoE layers whose tokens belong to one image each: all but the language model's."""
    return [name for name in names if "language_model" not in name]


@dataclass
class Tally:
    """Images seen, and per layer `counts` [N] int64 and `gates` [N + 5] float64."""

    images: int
    counts: list[np.ndarray]
    gates: list[np.ndarray]

    def add(self, other: Tally) -> None:
        self.images += other.images
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.gates = [mine + theirs for mine, theirs in zip(self.gates, other.gates, strict=True)]

    def mean(self, name: str) -> list[float] | None:
        """Per layer: "entropy", "margin" or "similarity" of a token on average; None: not recorded everywhere."""
        value, number = (GATES.index(n) - len(GATES) for n in (name, "compared" if name == "similarity" else "tokens"))
        if any(gates[number] == 0 for gates in self.gates):
            return None
        return [float(gates[value] / gates[number]) for gates in self.gates]


@dataclass
class TaskCounts:
    """One task: its total, and `categories[field][value]` for the fields its documents are sorted by."""

    total: Tally
    categories: dict[str, dict[str, Tally]] = field(default_factory=dict)


@dataclass
class RoutingCounts:
    """Expert choices of one model over the image tokens of whole benchmarks.

    A token counts once per expert it is sent to, so a layer's counts add up to tokens * K.
    """

    layers: list[str]
    tasks: dict[str, TaskCounts] = field(default_factory=dict)

    def add(
        self,
        task: str,
        categories: Mapping[str, str],
        counts: Sequence[np.ndarray],
        gates: Sequence[np.ndarray] | None = None,
        *,
        images: int = 1,
    ) -> None:
        """Add the choices of `images` images of one document: one [N] and one [N + 5] array per layer.

        gates: none given = not recorded, which leaves their sums as they are.
        """
        if len(counts) != len(self.layers):
            raise ValueError(f"counts of {len(counts)} layers given, expected {len(self.layers)}")
        if gates is None:
            gates = [np.zeros(len(c) + len(GATES)) for c in counts]
        one = Tally(
            images, [np.asarray(c, dtype=np.int64) for c in counts], [np.asarray(g, dtype=np.float64) for g in gates]
        )
        entry = self.tasks.setdefault(task, TaskCounts(self._empty(one)))
        entry.total.add(one)
        for name, value in categories.items():
            entry.categories.setdefault(name, {}).setdefault(value, self._empty(one)).add(one)

    def merge(self, other: RoutingCounts) -> None:
        """Add what another process counted; both must have counted the same layers."""
        if other.layers != self.layers:
            raise ValueError(f"cannot merge routing counts of layers {other.layers} into those of {self.layers}")
        for task, theirs in other.tasks.items():
            mine = self.tasks.setdefault(task, TaskCounts(self._empty(theirs.total)))
            mine.total.add(theirs.total)
            for name, values in theirs.categories.items():
                for value, tally in values.items():
                    mine.categories.setdefault(name, {}).setdefault(value, self._empty(tally)).add(tally)

    def over_tasks(self, tasks: Iterable[str] | None = None) -> list[np.ndarray]:
        """Counts per layer, summed over `tasks` (default: all)."""
        chosen = [self.tasks[t].total for t in (self.tasks if tasks is None else tasks)]
        return [np.sum(layer, axis=0) for layer in zip(*(tally.counts for tally in chosen), strict=True)]

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON, in one rename."""
        tasks = {
            name: {
                **_tally_to_json(task.total),
                "categories": {
                    key: {value: _tally_to_json(tally) for value, tally in values.items()}
                    for key, values in task.categories.items()
                },
            }
            for name, task in self.tasks.items()
        }
        write_atomically(path, json.dumps({"format": FORMAT, "layers": self.layers, "tasks": tasks}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> RoutingCounts:
        """Read what `save` wrote.

        Raises:
            DataError: not a routing record, or one of another format.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT:
                raise DataError(f"{path} has format {content['format']}, expected {FORMAT}: evaluate again")
            tasks = {
                name: TaskCounts(
                    _tally_from_json(task),
                    {
                        key: {value: _tally_from_json(tally) for value, tally in values.items()}
                        for key, values in task["categories"].items()
                    },
                )
                for name, task in content["tasks"].items()
            }
            return cls(list(content["layers"]), tasks)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not a routing record ({error!r}): evaluate the checkpoint again") from error

    @staticmethod
    def _empty(like: Tally) -> Tally:
        return Tally(0, [np.zeros_like(c) for c in like.counts], [np.zeros_like(g) for g in like.gates])


def _tally_to_json(tally: Tally) -> dict:
    return {
        "images": tally.images,
        "counts": [c.tolist() for c in tally.counts],
        "gates": [[round(float(value), 6) for value in gates] for gates in tally.gates],
    }


def _tally_from_json(content: dict) -> Tally:
    return Tally(
        int(content["images"]),
        [np.asarray(c, dtype=np.int64) for c in content["counts"]],
        [np.asarray(g, dtype=np.float64) for g in content["gates"]],
    )
