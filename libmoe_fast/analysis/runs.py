"""What training and evaluation left in a folder of runs, read back without the model."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from libmoe_fast.analysis.choices import Choices, read_choices
from libmoe_fast.analysis.counts import RoutingCounts, Tally
from libmoe_fast.analysis.metrics import layer_entropy, load_imbalance, total_entropy
from libmoe_fast.analysis.results import DROPPED, EXPORTS, HELD_OUT, RESULTS, ROUTING, exports_of, read_results
from libmoe_fast.errors import ConfigError

LOG = "log.jsonl"
# Folders of a run that hold no other run.
_INSIDE = {"checkpoints", "final", "answers", "samples", "judged", "tensorboard", EXPORTS}
ENCODERS = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}


@dataclass
class Run:
    """One run: training log, evaluation scores, expert-selection counts. Any of them may be missing."""

    name: str
    folder: Path
    router: str | None = None  # None: dense, or not known
    encoder: str | None = None  # the vision tower's family; None: not known
    log: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    counts: RoutingCounts | None = None
    history: dict[int, dict[str, float]] = field(default_factory=dict)  # scores of its exports, by step
    without_top1: dict[str, float] = field(default_factory=dict)  # scores, each token's first expert taken away
    weights: dict[str, dict[str, Any]] = field(default_factory=dict)  # see weights.weight_distances
    held_out: list[tuple[float, float]] = field(default_factory=list)  # (share of the steps, loss); see train.held_out
    evaluations: list[Path] = field(default_factory=list)  # folders of results.json
    settings: dict[str, Any] | None = None  # its config.yaml without `run`, where the seed is; None: not known
    changes: dict[str, list] | None = None  # what routing_figures.changed_choices has found, which takes a while

    @property
    def total_steps(self) -> int | None:
        return self.log[-1].get("total_steps") if self.log else None

    def over_training(self, column: str) -> list[tuple[float, float]]:
        """(share of the steps done, score) of its exports and of final/, where the column was scored."""
        points = [(step, scores.get(column)) for step, scores in sorted(self.history.items())]
        total = self.total_steps or max(self.history, default=0)
        points = [(step / total, score) for step, score in points if score is not None and total]
        return [*points, (1.0, self.scores[column])] if points and column in self.scores else points

    def choices_over_training(self) -> Iterator[tuple[float, Choices]]:
        """(share of the steps done, choices) of its exports and of final/, where evaluation kept them."""
        total = self.total_steps or max(self.history, default=0)
        places = [(step / total, path / "eval") for step, path in exports_of(self.folder)] if total else []
        for share, path in [*places, (1.0, self.folder / "eval")]:  # one at a time: they may be large
            if choices := read_choices(path):
                yield share, choices

    @property
    def step_milliseconds(self) -> float | None:
        """Median training step, of the steps in the log."""
        seconds = [line["step_seconds"] for line in self.log if line.get("step_seconds") is not None]
        return 1000 * statistics.median(seconds) if seconds else None

    @property
    def entropy_total(self) -> float | None:
        """H_total (eq. 5) over all evaluated images."""
        layers = self._layer_counts()
        return total_entropy(layers) if layers else None

    @property
    def imbalance(self) -> float | None:
        """Load imbalance over all evaluated images: 1 is even."""
        layers = self._layer_counts()
        return load_imbalance(layers) if layers else None

    def routing_by_task(self) -> list[dict[str, Any]]:
        """Per task: images, H_total and load imbalance of the choices, and entropy, margin and output similarity of a
        token, averaged over layers. The entropy is LibMoE's confidence (figure 6): of its gate probabilities, in bits.
        """
        if not self._layer_counts():
            return []
        return [
            {
                "task": name,
                "images": task.total.images,
                "H_total": total_entropy(task.total.counts),
                "load_imbalance": load_imbalance(task.total.counts),
                "confidence_entropy": _mean(task.total, "entropy"),
                "margin": _mean(task.total, "margin"),
                "similarity": _mean(task.total, "similarity"),
            }
            for name, task in self.counts.tasks.items()
        ]

    def entropy_details(self) -> dict[str, Any] | None:
        """H^(l) of every layer, and H_total of every task and category, as plain values."""
        layers = self._layer_counts()
        if not layers:
            return None
        return {
            "layers": {name: layer_entropy(c) for name, c in zip(self.counts.layers, layers, strict=True)},
            "tasks": {
                name: {
                    "images": task.total.images,
                    "H_total": total_entropy(task.total.counts),
                    "categories": {
                        key: {value: total_entropy(tally.counts) for value, tally in values.items()}
                        for key, values in task.categories.items()
                    },
                }
                for name, task in self.counts.tasks.items()
            },
        }

    def _layer_counts(self) -> list:
        return self.counts.over_tasks() if self.counts is not None and self.counts.layers else []


def _mean(tally: Tally, name: str) -> float | None:
    layers = tally.mean(name)
    return None if layers is None else statistics.fmean(layers)


def find_runs(folder: str | Path) -> list[Run]:
    """All runs in `folder` (itself one, perhaps), by name.

    Raises:
        ConfigError: there is no such folder, or nothing in it that train or evaluate wrote.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: give one that holds runs of libmoe-fast train or evaluate")
    homes: dict[Path, list[Path]] = {}  # run -> its evaluation folders
    for path in _walk(folder):
        if (path / LOG).is_file():
            homes.setdefault(path, [])
        elif read_results(path) is not None:
            homes.setdefault(path if path == folder else path.parent, []).append(path)
    if not homes:
        raise ConfigError(f"{folder} holds no run: expected {LOG} of libmoe-fast train, or {RESULTS} of evaluate")
    return [_read_run(folder, home, evaluations) for home, evaluations in sorted(homes.items())]


def _walk(folder: Path) -> Iterator[Path]:
    for place, names, _ in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in _INSIDE)
        yield Path(place)


def _read_run(root: Path, home: Path, evaluations: list[Path]) -> Run:
    name = home.resolve().name if home == root else str(home.relative_to(root))
    results = {path: read_results(path) for path in evaluations}
    checkpoints = [Path(found["checkpoint"]["path"]) for found in results.values()]
    run = Run(name, home, *_router_and_encoder([home / "final", *checkpoints]), _read_log(home / LOG))
    run.settings = settings_of(home)
    if total := run.total_steps:
        run.held_out = [(line["step"] / total, line["loss"]) for line in _read_log(home / HELD_OUT)]
    for step, path in exports_of(home):
        if (found := read_results(path / "eval")) is not None:
            run.history[step] = found["scores"]
    for path, found in results.items():
        if DROPPED in found["checkpoint"]:
            run.without_top1.update(found["scores"])
            continue
        run.evaluations.append(path)
        run.scores.update(found["scores"])
        run.weights.update(found.get("weights", {}))
        if (path / ROUTING).is_file():
            counts = RoutingCounts.load(path / ROUTING)
            if run.counts is None or run.counts.layers != counts.layers:
                run.counts = counts
            else:
                run.counts.tasks.update(counts.tasks)
    return run


def settings_of(folder: Path) -> dict[str, Any] | None:
    """What a run was trained with, its config.yaml without `run`; None where there is none."""
    import yaml

    try:
        content = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return {name: section for name, section in content.items() if name != "run"} if isinstance(content, dict) else None


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The steps logged so far. A step done twice, before and after an interruption, counts as the later one."""
    steps: dict[Any, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line a killed run was writing
                continue
            if isinstance(entry, dict) and "step" in entry:
                steps[entry["step"]] = entry
    return [steps[step] for step in sorted(steps)]


def _router_and_encoder(checkpoints: list[Path]) -> tuple[str | None, str | None]:
    """Of the first that says: the run's own checkpoint, or the one its evaluation read."""
    router = encoder = None
    for checkpoint in checkpoints:
        layers = _json(checkpoint / "libmoe_fast.json").get("layers")
        if router is None and isinstance(layers, dict):
            router = "+".join(sorted({str(layer["router"]) for layer in layers.values()})) or None
        vision = _json(checkpoint / "config.json").get("vision_config")
        if encoder is None and isinstance(vision, dict):
            encoder = ENCODERS.get(vision.get("model_type"), vision.get("model_type"))
    return router, encoder


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
