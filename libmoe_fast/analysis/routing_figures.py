"""LibMoE's figures of where tokens go (arXiv 2411.00918): over training, by subtask, task, layer and encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from libmoe_fast.analysis.choices import changed, coactivation, left, read_choices
from libmoe_fast.analysis.counts import Tally, TaskCounts
from libmoe_fast.analysis.figures import COLOURS, groups, labels, numbered, short_layer_name
from libmoe_fast.analysis.metrics import total_entropy
from libmoe_fast.analysis.runs import Run
from libmoe_fast.analysis.significance import over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = "mme"  # the paper's figures are of its subtasks


def subtask_entropy(runs: Sequence[Run], path: Path) -> bool:
    """Figure 5: H_total by subtask, one panel per task and colour per run; False: no run has subtasks."""
    shown = _counted(runs)
    panels = [
        (title, task, field, part)
        for task, field in _subtasks(shown)
        for parts in [groups([run for run in shown if _categories(run, task, field)], runs)]
        for title, part in zip(numbered(f"{task}, by {field}", parts), parts, strict=True)
    ]
    if not panels:
        return False
    names = labels(shown)
    widest = max(len(_values(part, task, field)) for _, task, field, part in panels)
    figure = _figure(max(5.5, 0.45 * widest + 2.5), 3.4, len(panels))
    for axis, (title, task, field, part) in zip(figure.axes, panels, strict=True):
        values = _values(part, task, field)
        for run, colour, marker in part:
            tallies = _categories(run, task, field)
            heights = [total_entropy(tallies[v].counts) if v in tallies else np.nan for v in values]
            axis.plot(range(len(values)), heights, marker=marker, color=colour, label=names[run.name], linewidth=1)
        axis.set_xticks(range(len(values)), values, rotation=35, ha="right", fontsize="small")
        axis.set_ylabel("H_total (bits)")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
    return True


def confidence(runs: Sequence[Run], path: Path) -> bool:
    """Figure 6: the entropy of a token's gate probabilities by task, averaged over tokens, samples and layers."""
    shown = [run for run in _counted(runs) if any(row["confidence_entropy"] for row in run.routing_by_task())]
    if not shown:
        return False
    names, parts = labels(shown), groups(shown, runs)
    tasks = list(dict.fromkeys(row["task"] for run in shown for row in run.routing_by_task()))
    figure = _figure(max(5.5, 0.8 * len(tasks) + 2.5), 3.4, len(parts))
    for axis, part in zip(figure.axes, parts, strict=True):
        for run, colour, marker in part:
            found = {row["task"]: row["confidence_entropy"] for row in run.routing_by_task()}
            heights = [np.nan if found.get(task) is None else found[task] for task in tasks]
            axis.plot(range(len(tasks)), heights, marker, color=colour, label=names[run.name], markersize=8)
        axis.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", fontsize="small")
        axis.set_xlim(-0.5, len(tasks) - 0.5)
        axis.set_ylabel("entropy of the gate (bits)")
        axis.set_title("Confidence: lower is more certain")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
    return True


def layer_choices(run: Run, path: Path, label: str | None = None) -> bool:
    """Figure 7: the experts' shares by subtask in two early, two middle and two late layers of the vision tower."""
    found = next(iter(_subtasks([run])), None) if _counted([run]) else None
    if found is None:
        return False
    tallies = _categories(run, *found)
    layers = [i for i, name in enumerate(run.counts.layers) if "projector" not in name] or [0]
    middle = len(layers) // 2
    chosen = [layers[i] for i in sorted({*range(min(2, len(layers))), max(middle - 1, 0), middle, -2 % len(layers)})]
    chosen = sorted({*chosen, layers[-1]})
    experts = max(len(next(iter(tallies.values())).counts[layer]) for layer in chosen)
    figure = _figure(0.34 * len(tallies) + 2.2, 2.6, len(chosen), columns=2)
    for axis, layer in zip(figure.axes, chosen, strict=True):
        start = np.zeros(len(tallies))
        for expert in range(experts):
            share = np.array([tally.counts[layer][expert] / tally.counts[layer].sum() for tally in tallies.values()])
            shade = COLOURS[expert] if experts <= len(COLOURS) else None
            axis.bar(range(len(tallies)), share, bottom=start, color=shade, label=f"expert {expert}", width=0.85)
            start += share
        axis.set_xticks(range(len(tallies)), tallies, rotation=60, ha="right", fontsize="x-small")
        axis.set_ylim(0, 1)
        axis.set_title(short_layer_name(run.counts.layers[layer]), fontsize="medium")
    if experts <= 16:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(f"{label or run.name}: expert shares on {found[0]}, by {found[1]}", fontsize="large")
    _save(figure, path)
    return True


def changes(runs: Sequence[Run], path: Path) -> bool:
    """Figure 4: the share of choices that changed since the checkpoint before, averaged over layers, by task."""
    series = {run.name: found for run in _counted(runs) if (found := changed_choices(run))}
    shown = [run for run in runs if run.name in series]
    tasks = list(dict.fromkeys(task for found in series.values() for task in found))
    panels = [
        (title, task, part)
        for task in tasks
        for parts in [groups([run for run in shown if task in series[run.name]], runs)]
        for title, part in zip(numbered(task, parts), parts, strict=True)
    ]
    if not panels:
        return False
    names = labels(shown)
    figure = _figure(6.5, 3.2, len(panels))
    for axis, (title, task, part) in zip(figure.axes, panels, strict=True):
        for run, colour, marker in part:
            points = np.array([(100 * share, 100 * slots.mean()) for _, share, slots, _ in series[run.name][task]])
            axis.plot(*points.T, f"{marker}-", color=colour, label=names[run.name])
        axis.set_xlabel("training done (%)")
        axis.set_ylabel("choices changed (%)")
        axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
    return True


def changed_choices(run: Run) -> dict[str, list[tuple[float, float, np.ndarray, np.ndarray]]]:
    """Per task and pair of checkpoints: (share of the steps at the first, at the second, changed [L], left [L])."""
    if run.changes is None:
        run.changes = {}
        for (since, before), (share, after) in pairwise(run.choices_over_training()):
            for task in dict.fromkeys(task for task, _ in after):
                slots, sets = changed(before, after, task), left(before, after, task)
                if slots is not None and sets is not None:
                    run.changes.setdefault(task, []).append((since, share, slots, sets))
    return run.changes


def chosen_together(run: Run, path: Path, label: str | None = None) -> bool:
    """How often two experts are chosen for one token, in the first, the middle and the last layer of the vision tower.

    False: evaluation kept no choices, or each token has one expert.
    """
    last = read_choices(run.folder / "eval")
    if not last or not _counted([run]) or all(chosen.shape[1] < 2 for chosen in next(iter(last.values()))):
        return False
    tasks = sorted({task for task, _ in last}, key=lambda task: task != FIRST)
    experts = [len(counts) for counts in next(iter(run.counts.tasks.values())).total.counts]
    matrices = coactivation(last, tasks[0], experts)
    layers = [i for i, name in enumerate(run.counts.layers) if "projector" not in name] or [0]
    chosen = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    figure = _figure(3.2, 2.9, len(chosen), columns=len(chosen))
    for axis, layer in zip(figure.axes, chosen, strict=True):
        matrix = matrices[layer].copy()
        np.fill_diagonal(matrix, np.nan)
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        if len(matrix) <= 8:
            for (i, j), value in np.ndenumerate(matrix):
                if np.isfinite(value):
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k")
        axis.set_xlabel("also chosen")
        axis.set_ylabel("chosen expert")
        axis.set_title(short_layer_name(run.counts.layers[layer]), fontsize="medium")
    figure.colorbar(image, ax=figure.axes[: len(chosen)], shrink=0.8)
    figure.suptitle(f"{label or run.name}: experts chosen together on {tasks[0]}", fontsize="large")
    _save(figure, path)
    return True


def encoders(runs: Sequence[Run], path: Path) -> bool:
    """Figure 8: H_total averaged over subtasks, per router, one bar per encoder; False: there are not two encoders."""
    shown = [run for run in _counted(runs) if run.encoder]
    kinds = sorted({run.encoder for run in shown})
    if len(kinds) < 2:
        return False
    routers = list(dict.fromkeys(run.router or run.name for run in shown))
    figure = _figure(max(5.0, 1.1 * len(routers) + 2), 3.4, 1)
    (axis,) = figure.axes
    width = 0.8 / len(kinds)
    for i, kind in enumerate(kinds):
        heights = [
            np.mean(found)
            if (found := [_average(r) for r in shown if r.encoder == kind and (r.router or r.name) == router])
            else np.nan
            for router in routers
        ]
        places = np.arange(len(routers)) + (i - (len(kinds) - 1) / 2) * width
        axis.bar(places, heights, width * 0.9, color=COLOURS[i], label=kind)
    axis.set_xticks(range(len(routers)), routers, rotation=20, ha="right")
    axis.set_ylabel("H_total (bits), mean over subtasks")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)
    return True


# ---------------------------------------------------------------------------------------------------------------------


def _counted(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.counts is not None and run.counts.layers and run.counts.tasks]


def _subtasks(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(task, field) of what has two subtasks or more; MME first, as in the paper."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        for name, task in run.counts.tasks.items():
            found |= dict.fromkeys((name, field) for field, values in task.categories.items() if len(values) > 1)
    return sorted(found, key=lambda pair: pair[0] != FIRST)


def _categories(run: Run, task: str, field: str) -> dict[str, Tally]:
    counts: TaskCounts | None = run.counts.tasks.get(task)
    return dict(sorted(counts.categories.get(field, {}).items())) if counts else {}


def _values(part: Sequence[tuple[Run, str, str]], task: str, field: str) -> list[str]:
    return sorted({value for run, _, _ in part for value in _categories(run, task, field)})


def _average(run: Run) -> float:
    """H_total over the subtasks of the paper's figure; over all tasks where there are none."""
    found = next(iter(_subtasks([run])), None)
    tallies = _categories(run, *found).values() if found else [task.total for task in run.counts.tasks.values()]
    return float(np.mean([total_entropy(tally.counts) for tally in tallies]))


def _figure(width: float, height: float, panels: int, *, columns: int = 1) -> Figure:
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)


def routing_figures(runs: Sequence[Run], folder: Path) -> Iterator[tuple[str, str]]:
    """Draws what the runs have records for; (file name, title) of each figure drawn."""
    for name, title, draw in (
        ("changes.png", "Choices changed between checkpoints (LibMoE, figure 4)", changes),
        ("subtasks.png", "H_total by subtask (LibMoE, figure 5)", subtask_entropy),
        ("confidence.png", "Confidence by task (LibMoE, figure 6)", confidence),
        ("encoders.png", "H_total by encoder (LibMoE, figure 8)", encoders),
    ):
        if draw(runs, folder / name):
            yield name, title
    names = labels(_counted(runs))
    others = {run.name for group in over_seeds(runs) for run in group[1:]}  # of runs with several seeds one is enough
    for run in _counted(runs):
        if run.name in others:
            continue
        name = f"layers-{run.name.replace('/', '-')}.png"
        if layer_choices(run, folder / name, names[run.name]):
            yield name, f"Choices by layer and subtask, {names[run.name]} (LibMoE, figure 7)"
        name = f"together-{run.name.replace('/', '-')}.png"
        if chosen_together(run, folder / name, names[run.name]):
            yield name, f"Experts chosen together, {names[run.name]}"
