"""PNG plots of a set of rows: time / limit against T, ours beside the peers, memory, and growth.

Ours is blue and thick everywhere, and every other engine keeps its colour in all plots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from libmoe_fast.analysis.figures import COLOURS
from libmoe_fast.benchmarks.arena import COPY, OURS
from libmoe_fast.benchmarks.results import Row, growth_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 6
MOST_GROUPS = 12
PRIORITY = ("layer", "encoder", "training", "experts", "permutation", "routing")
SLOWEST_SHOWN = 8.0  # bars end here, with the number written on them: one slow peer would flatten all the others
NUMBER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # readable where it crosses a line
PROGRAMS = ("loop", "split", "grouped_mm", "hf_eager", "hf_grouped_mm", "hf_batched_mm", "st_moe")


def colour(entrant: str) -> str:
    others = [*PROGRAMS, "megablocks", "scattermoe", "hf_sonicmoe"]
    if entrant == OURS:
        return COLOURS[0]
    return (*COLOURS[1:], "#8C564B", "#BCBD22", "#17BECF")[others.index(entrant) if entrant in others else -1]


def over_limit_by_tokens(rows: Sequence[Row], path: Path) -> bool:
    """time / limit of every engine against T, a panel per layer and mode; False: no layer has two T."""
    key = lambda r: (r.shape, r.dtype, r.mode)  # noqa: E731
    chosen = sorted((r for r in rows if r.subject == "layer" and not r.sweep and r.router == "smoe"), key=key)
    panels = [(name, list(group)) for name, group in itertools.groupby(chosen, key=key)]
    panels = [(name, group) for name, group in panels if len({r.tokens for r in group}) > 1][:MOST_PANELS]
    if not panels:
        return False
    figure, axes = _panels(len(panels), width=6.4, height=4.2)
    for axis, ((shape, dtype, mode), group) in zip(axes, panels, strict=False):
        lines = {r.entrant: sorted((p.tokens, p.over_limit) for p in group if p.entrant == r.entrant) for r in group}
        for entrant, points in lines.items():
            if entrant == COPY:
                continue
            tokens = [t for t, _ in points]
            middle = [s.median for _, s in points]
            bars = [[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]]
            width = 3 if entrant == OURS else 1.5
            axis.errorbar(
                tokens,
                middle,
                bars,
                label=entrant,
                color=colour(entrant),
                linewidth=width,
                marker="o",
                capsize=3,
                zorder=1 + width,
            )
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        _log_axes(axis, sorted({r.tokens for r in group}))
        axis.set(title=f"{shape}, {dtype}, {mode}", xlabel="tokens", ylabel="time / limit (lower is better)")
        axis.legend(fontsize="small")
    figure.suptitle("Whole layer: time against dense GEMMs of the same FLOPs")
    figure.savefig(path, dpi=130)
    return True


def beside_peers(rows: Sequence[Row], path: Path) -> bool:
    """Time of every engine as a multiple of ours, a group of bars per case; False: no case has a peer."""
    return _bars(
        rows,
        path,
        value=lambda row, ours: row.over_limit.median / ours.over_limit.median,
        title="Time of each engine / ours (right of the line: slower)",
        label="time / ours",
        line=1.0,
    )


def memory(rows: Sequence[Row], path: Path) -> bool:
    """Peak memory of every engine, with the part saved for backward drawn darker; False: no case has a peer."""
    return _bars(
        [row for row in rows if row.mode == "fwd+bwd" and row.peak_bytes],
        path,
        value=lambda row, ours: row.peak_bytes / ours.peak_bytes,
        title="Peak memory, forward and backward / ours (hatched: saved)",
        label="peak memory / ours",
        line=1.0,
        part=lambda row, ours: (row.saved_bytes or 0) / ours.peak_bytes,
    )


def growth(rows: Sequence[Row], path: Path) -> bool:
    """Time per token against T, N, K and H, with the fitted exponents; False: no growth series."""
    series = list(growth_of(rows))
    letters = list(dict.fromkeys(g.letter for g in series))
    if not letters:
        return False
    names = {"T": "tokens T", "N": "experts N", "K": "top-K", "H": "hidden size H"}
    figure, axes = _panels(len(letters), width=5.4, height=3.8)
    for axis, letter in zip(axes, letters, strict=False):
        for g in (g for g in series if g.letter == letter):
            micro = [s * 1e6 for s in g.seconds_per_token]
            label = f"{g.entrant}: exponent {g.exponent:+.2f}"
            width = 3 if g.entrant == OURS else 1.5
            axis.plot(
                g.values, micro, marker="o", label=label, color=colour(g.entrant), linewidth=width, zorder=1 + width
            )
        expected = next(g.expected for g in series if g.letter == letter)
        axis.set(
            title=f"against {names[letter]} (exponent of the work: {expected})",
            xlabel=names[letter],
            ylabel="µs per token",
        )
        _log_axes(axis, next(g.values for g in series if g.letter == letter))
        axis.set_ylim(axis.get_ylim()[0] / 1.5, axis.get_ylim()[1] * 1.5)  # a flat line should look flat
        axis.legend(fontsize="small")
    figure.suptitle("Growth: time per token of a whole layer, forward and backward")
    figure.savefig(path, dpi=130)
    return True


PLOTS = {
    "over_limit.png": over_limit_by_tokens,
    "peers.png": beside_peers,
    "memory.png": memory,
    "growth.png": growth,
}


def _bars(rows: Sequence[Row], path: Path, *, value, title: str, label: str, line: float, part=None) -> bool:
    """Horizontal bars of every engine, by case; ours is the line. The first MOST_GROUPS cases with the SMoE router."""
    from matplotlib.figure import Figure

    groups = []
    chosen = [row for row in rows if not row.sweep and row.entrant != COPY and row.router == "smoe"]
    chosen.sort(key=lambda row: PRIORITY.index(row.subject))  # stable: the order of the preset within a subject
    for _, group in itertools.groupby(chosen, key=lambda row: row.case):
        entrants = {row.entrant: row for row in group}
        if OURS in entrants and len(entrants) > 1:
            groups.append((entrants.pop(OURS), list(entrants.values())))
    groups = groups[:MOST_GROUPS]
    if not groups:
        return False
    heights = [len(peers) + 1.0 for _, peers in groups]
    figure = Figure(figsize=(10, 1.2 + 0.24 * sum(heights)), layout="constrained")
    axis = figure.subplots()
    position, ticks, names, seen = 0.0, [], [], set()
    for ours, peers in groups:
        ticks.append(position + (len(peers) - 1) / 2)
        names.append(f"{ours.subject}, {ours.shape}\nT {ours.tokens}, {ours.dtype}, {ours.mode}")
        for peer in sorted(peers, key=lambda row: value(row, ours)):
            size = value(peer, ours)
            shown = min(size, SLOWEST_SHOWN)
            name = peer.entrant if peer.entrant not in seen else None
            seen.add(peer.entrant)
            axis.barh(position, shown, height=0.85, color=colour(peer.entrant), label=name)
            if part is not None:
                saved = min(part(peer, ours), SLOWEST_SHOWN)
                axis.barh(position, saved, height=0.85, facecolor="none", edgecolor="white", hatch="////", linewidth=0)
            axis.text(shown + 0.05, position, f"{size:.2f}", va="center", fontsize="x-small", bbox=NUMBER)
            position += 1
        position += 1
    axis.axvline(line, color=COLOURS[0], linewidth=2, label=OURS)
    axis.set_yticks(ticks, names, fontsize="small")
    axis.set_xlim(right=axis.get_xlim()[1] * 1.05)
    axis.set_ylim(position - 0.5, -1)
    axis.set_xlabel(label)
    figure.suptitle(title)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)
    return True


def _panels(count: int, *, width: float, height: float):
    from matplotlib.figure import Figure

    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.4), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _log_axes(axis: Axes, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.grid(alpha=0.3)
