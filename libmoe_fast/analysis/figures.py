"""PNG figures of a set of runs: training curves, and the share of tokens each expert gets in each layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from libmoe_fast.analysis.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers too.
MARKERS = "os^DvP*X"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#000000")


def training_curves(runs: Sequence[Run], path: Path) -> bool:
    """Loss, balance loss and busiest expert of every run over its steps, in one figure; False: no run has a log."""
    logged = [run for run in runs if run.log]
    if not logged:
        return False
    dense, moe = [r for r in logged if r.router is None], [r for r in logged if r.router is not None]
    panels = []
    if dense:
        panels.append(("Loss, dense stages", dense, _loss))
    if moe:
        panels.append(("Loss, MoE stage", moe, _loss))
        panels.append(("Balance loss, mean over layers", [r for r in moe if len(_balance(r)[0])], _balance))
        panels.append(("Busiest expert's load / mean load", [r for r in moe if len(_busiest(r)[0])], _busiest))
    panels = [
        (name, part, values)
        for title, members, values in panels
        for parts in [groups(members, runs)]
        for name, part in zip(numbered(title, parts), parts, strict=True)
    ]
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    names = labels(logged)
    for axis, (title, members, values) in zip(axes, panels, strict=False):
        for run, colour, _ in members:
            _draw_curve(axis, *values(run), label=names[run.name], colour=colour)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=150)
    return True


def expert_shares(runs: Sequence[Run], path: Path) -> bool:
    """Each expert's share of the tokens, per layer, one panel per run; False: no run has routing counts."""
    counted = [run for run in runs if run.counts is not None and run.counts.tasks and run.counts.layers]
    if not counted:
        return False
    from matplotlib.figure import Figure

    deepest = max(len(run.counts.layers) for run in counted)
    columns = min(len(counted), 3)
    rows = -(-len(counted) // columns)
    figure = Figure(figsize=(4.4 * columns + 0.8, (0.28 * deepest + 1.3) * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = labels(counted)
    for axis, run in zip(axes, counted, strict=False):
        _draw_shares(axis, run, names[run.name])
    for axis in axes[len(counted) :]:
        axis.remove()
    most = max(axes[: len(counted)], key=lambda axis: len(axis.get_legend_handles_labels()[0]))
    figure.legend(*most.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle("Expert shares on the evaluated images, by layer", fontsize="large")
    figure.savefig(path, dpi=150)
    return True


def progress(runs: Sequence[Run], path: Path) -> bool:
    """LibMoE's figures 3 and 9: scores over training, one panel per column; False: no run was evaluated on the way."""
    shown = [run for run in runs if run.history]
    columns = dict.fromkeys(column for run in shown for scores in run.history.values() for column in scores)
    panels = [
        (name, part, column)
        for column in columns
        for parts in [groups(shown, runs)]
        for name, part in zip(numbered(column, parts), parts, strict=True)
    ]
    if not panels:
        return False
    from matplotlib.figure import Figure

    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.6 * across + 1.6, 3.2 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    names = labels(shown)
    for axis, (title, members, column) in zip(axes, panels, strict=False):
        for run, colour, marker in members:
            if points := run.over_training(column):
                shares, scores = zip(*points, strict=True)
                axis.plot([100 * share for share in shares], scores, f"{marker}-", color=colour, label=names[run.name])
        axis.set_title(title)
        axis.set_xlabel("training done (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=150)
    return True


def labels(runs: Sequence[Run]) -> dict[str, str]:
    """What a legend calls each run: its router and encoder, with as much more as tells it from the others. Its name
    where that says all of it."""
    kinds = {run.name: run.router or "dense" for run in runs}
    encoders = {run.encoder for run in runs if run.encoder}
    if len(encoders) > 1:
        kinds = {run.name: f"{kinds[run.name]}, {run.encoder or '?'}" for run in runs}
    alike = Counter(kinds.values())
    said = {name: all(word in name.lower() for word in kind.lower().split(", ")) for name, kind in kinds.items()}
    return {
        name: kind if alike[kind] == 1 else name if said[name] else f"{kind} ({name})" for name, kind in kinds.items()
    }


def groups(members: Sequence[Run], runs: Sequence[Run]) -> list[list[tuple[Run, str, str]]]:
    """The members with a colour and a marker each, in so many groups of about a size that no colour comes twice in one.

    A run has the same colour wherever it is shown, whoever else is: that goes by its place among all `runs`.
    """
    kinds = [[run for run in runs if run.router is None], [run for run in runs if run.router is not None]]
    places = {run.name: i for kind in kinds for i, run in enumerate(kind)}
    sizes = [-(-len(kind) // max(1, -(-len(kind) // len(COLOURS)))) for kind in kinds]
    parts = {}
    for run in members:
        place, size = places[run.name], sizes[run.router is not None]
        styled = (run, COLOURS[place % size], MARKERS[place % size])
        parts.setdefault((run.router is not None, place // size), []).append(styled)
    return [parts[key] for key in sorted(parts)]


def numbered(title: str, parts: Sequence) -> list[str]:
    return [f"{title} ({i} of {len(parts)})" if len(parts) > 1 else title for i in range(1, len(parts) + 1)]


def _draw_curve(axis: Axes, steps: np.ndarray, values: np.ndarray, *, label: str, colour: str) -> None:
    """The raw values faintly, and their running mean over 5% of the steps."""
    axis.plot(steps, values, color=colour, alpha=0.15, linewidth=0.8)
    axis.plot(steps, _smooth(values, max(1, len(values) // 20)), color=colour, label=label, linewidth=1.5)


def _draw_shares(axis: Axes, run: Run, title: str) -> None:
    counts = run.counts.over_tasks()
    experts = max(len(c) for c in counts)
    share = np.array([np.pad(c / c.sum(), (0, experts - len(c))) for c in counts])  # [L, N]
    start = np.zeros(len(counts))
    for expert in range(experts):
        shade = COLOURS[expert % len(COLOURS)] if experts <= len(COLOURS) else None  # None: matplotlib's cycle
        axis.barh(range(len(counts)), share[:, expert], left=start, color=shade, label=f"expert {expert}", height=0.8)
        start += share[:, expert]
    for boundary in np.arange(1, experts) / experts:
        axis.axvline(boundary, color="white", linewidth=0.8, linestyle=":")  # where even shares would meet
    axis.set_yticks(range(len(counts)), [short_layer_name(name) for name in run.counts.layers], fontsize="small")
    axis.invert_yaxis()  # the first layer on top
    axis.set_xlim(0, 1)
    axis.set_title(title, fontsize="medium")


def short_layer_name(name: str) -> str:
    """`model.vision_tower.encoder.layers.3.mlp` -> `vision 3`."""
    if "projector" in name:
        return "projector"
    number = re.search(r"layers\.(\d+)\.", name + ".")
    return f"vision {number[1]}" if number else name


def _loss(run: Run) -> tuple[np.ndarray, np.ndarray]:
    return _series(run, lambda line: line.get("loss"))


def _balance(run: Run) -> tuple[np.ndarray, np.ndarray]:
    return _series(run, lambda line: line.get("balance_loss"))


def _busiest(run: Run) -> tuple[np.ndarray, np.ndarray]:
    def value(line: dict) -> float | None:
        shares = [s for s in (line.get("expert_share") or {}).values() if s]
        return float(np.mean([len(s) * max(s) for s in shares])) if shares else None

    return _series(run, value)


def _series(run: Run, value) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], v) for line in run.log if (v := value(line)) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values (fewer at the start)."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - width)
    return (total[last] - total[first]) / (last - first)
