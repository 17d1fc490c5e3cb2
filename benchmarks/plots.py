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
from libmoe_fast.benchmarks.measure import Spread
from libmoe_fast.benchmarks.results import Growth, Row, growth_of, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
MOST_GROUPS = 12
MOST_IN_COLUMN = 8
PRIORITY = ("layer", "encoder", "training", "experts", "permutation", "routing")
SLOWEST_SHOWN = 8.0  # bars end here, with the number written on them: one slow peer would flatten all the others
SIZES = {"T": "tokens T", "N": "experts N", "K": "top-K", "H": "hidden size H"}
NUMBER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # readable where it crosses a line
PROGRAMS = ("loop", "split", "grouped_mm", "hf_eager", "hf_grouped_mm", "hf_batched_mm", "st_moe")


def colour(entrant: str) -> str:
    others = [*PROGRAMS, "megablocks", "scattermoe", "hf_sonicmoe", "torch sort + index", "plain PyTorch"]
    if entrant == OURS:
        return COLOURS[0]
    more = ("#8C564B", "#BCBD22", "#17BECF", "#9467BD", "#FF9896")
    return (*COLOURS[1:], *more)[others.index(entrant) if entrant in others else -1]


def over_limit_by_tokens(rows: Sequence[Row], path: Path) -> bool:
    """time / limit of every engine against T, a panel per layer and mode; False: no layer has two T.

    Without engines so slow that they were timed once: one of them would flatten all the others.
    """
    key = lambda r: (r.shape, r.dtype, r.mode)  # noqa: E731
    wanted = lambda r: r.subject == "layer" and not r.sweep and r.router == "smoe" and r.entrant != COPY  # noqa: E731
    chosen = sorted((r for r in rows if wanted(r) and r.rounds > 1), key=key)
    panels = [(name, list(group)) for name, group in itertools.groupby(chosen, key=key)]
    panels = [(name, group) for name, group in panels if len({r.tokens for r in group}) > 1][:MOST_PANELS]
    if not panels:
        return False
    figure, axes = _panels(len(panels), width=6.4, height=4.2, right=2.0)
    legend = {}
    for axis, (name, group) in zip(axes, panels, strict=True):
        for entrant in dict.fromkeys(r.entrant for r in group):
            points = sorted((r.tokens, r.over_limit) for r in group if r.entrant == entrant)
            legend.setdefault(entrant, _line_with_quartiles(axis, entrant, points))
        legend["limit: dense GEMMs"] = axis.axhline(1, color="black", linewidth=1, linestyle=":")
        _log_axes(axis, sorted({r.tokens for r in group}))
        axis.set(title=", ".join(name), xlabel="tokens", ylabel="time / limit (lower is better)")
    _legend(figure, legend)
    figure.suptitle("Whole layer: time over that of dense GEMMs of the same FLOPs")
    figure.savefig(path, dpi=130)
    return True


def _line_with_quartiles(axis: Axes, entrant: str, points: Sequence[tuple[int, Spread]]):
    tokens, spreads = zip(*points, strict=True)
    middle = [s.median for s in spreads]
    bars = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    return axis.errorbar(tokens, middle, bars, marker="o", capsize=3, **_style(entrant))


def _style(entrant: str) -> dict:
    width = 3 if entrant == OURS else 1.5
    return {"color": colour(entrant), "linewidth": width, "zorder": 1 + width}


def beside_peers(rows: Sequence[Row], path: Path) -> bool:
    """Time of every engine as a multiple of ours, a group of bars per case; False: no case has a peer."""
    return _bars(
        rows,
        path,
        value=lambda row, ours: row.over_limit.median / ours.over_limit.median,
        amount=lambda ours: f"ours: {milliseconds(ours.time.median)} ms",
        title="Time of each engine over ours (right of the line: slower)",
        label="time / ours",
    )


def memory(rows: Sequence[Row], path: Path) -> bool:
    """Peak memory of every engine, with the part kept for backward hatched; False: no case has a peer."""
    return _bars(
        [row for row in rows if row.mode == "fwd+bwd" and row.peak_bytes],
        path,
        value=lambda row, ours: row.peak_bytes / ours.peak_bytes,
        amount=lambda ours: f"ours: {ours.peak_bytes / 2**20:.3g} MiB",
        title="Peak memory over ours, forward and backward (hatched: kept for backward)",
        label="peak memory / ours",
        part=lambda row, ours: (row.saved_bytes or 0) / ours.peak_bytes,
    )


def growth(rows: Sequence[Row], path: Path) -> bool:
    """Time per token against T, N, K and H, with the fitted exponents; False: no growth series."""
    series = list(growth_of(rows))
    letters = list(dict.fromkeys(g.letter for g in series))
    if not letters:
        return False
    figure, axes = _panels(len(letters), width=5.4, height=4.2)
    for axis, letter in zip(axes, letters, strict=True):
        group = [g for g in series if g.letter == letter]
        for g in group:
            micro = [s * 1e6 for s in g.seconds_per_token]
            axis.plot(g.values, micro, marker="o", label=f"{g.entrant}: {g.exponent:+.2f}", **_style(g.entrant))
        _draw_work(axis, next((g for g in group if g.entrant == OURS), group[0]))
        axis.set(title=f"against {SIZES[letter]}", xlabel=SIZES[letter], ylabel="µs per token")
        _log_axes(axis, group[0].values)
        axis.set_ylim(axis.get_ylim()[0] / 1.5, axis.get_ylim()[1] * 1.5)  # a flat line should look flat
        axis.legend(title="exponents", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="small")
    figure.suptitle("Growth: time per token of a whole layer, forward and backward")
    figure.savefig(path, dpi=130)
    return True


def _draw_work(axis: Axes, g: Growth) -> None:
    """How time would grow if it grew as the work does, from the last point of `g`."""
    value, last = g.values[-1], g.seconds_per_token[-1] * 1e6
    work = [last * (v / value) ** g.expected for v in g.values]
    axis.plot(g.values, work, color="black", linewidth=1, linestyle=":", label=f"the work: {g.expected}")


PLOTS = {
    "over_limit.png": over_limit_by_tokens,
    "peers.png": beside_peers,
    "memory.png": memory,
    "growth.png": growth,
}


def _bars(rows: Sequence[Row], path: Path, *, value, amount, title: str, label: str, part=None) -> bool:
    """Horizontal bars of every engine, by case, in one column or two.

    value    length of a row's bar, given the row and ours; `part` of it is hatched
    amount   what ours is in figures, written beside the case
    """
    from matplotlib.figure import Figure

    groups = _groups(rows)
    if not groups:
        return False
    in_column = len(groups) if len(groups) <= MOST_IN_COLUMN else -(-len(groups) // 2)
    columns = [groups[i : i + in_column] for i in range(0, len(groups), in_column)]
    lines = max(sum(len(group) + 1 for _, group in column) for column in columns)
    figure = Figure(figsize=(2 + 7.5 * len(columns), 1.4 + 0.24 * lines), layout="constrained")
    legend = {}
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False, sharex=True).flat, columns, strict=True):
        position, ticks, names = 0, [], []
        for ours, group in column:
            ticks.append(position + (len(group) - 1) / 2)
            names.append(f"{ours.subject}, {ours.shape}\nT {ours.tokens}, {ours.dtype}, {ours.mode}\n{amount(ours)}")
            for row in sorted(group, key=lambda row: value(row, ours)):
                bar = _bar(axis, position, row.entrant, value(row, ours), part(row, ours) if part else 0)
                legend.setdefault(row.entrant, bar)
                position += 1
            position += 1
        axis.axvline(1, color=COLOURS[0], linewidth=2)
        axis.set_yticks(ticks, names, fontsize="small")
        axis.set_ylim(lines - 0.5, -1)  # bars of one height in both columns
        axis.set_xlabel(label)
    axis.set_xlim(right=axis.get_xlim()[1] * 1.05)  # room for the numbers
    figure.suptitle(title)
    _legend(figure, legend)
    figure.savefig(path, dpi=130)
    return True


def _groups(rows: Sequence[Row]) -> list[tuple[Row, list[Row]]]:
    """(Ours, everyone) of the cases to draw as bars: with the SMoE router, and of many an even choice."""
    groups = []
    chosen = [row for row in rows if not row.sweep and row.entrant != COPY and row.router == "smoe"]
    chosen.sort(key=lambda row: PRIORITY.index(row.subject))  # stable: the order of the preset within a subject
    for _, group in itertools.groupby(chosen, key=lambda row: row.case):
        entrants = {row.entrant: row for row in group}
        if OURS in entrants and len(entrants) > 1:
            groups.append((entrants[OURS], list(entrants.values())))
    return groups[:: -(-len(groups) // MOST_GROUPS) or 1]


def _bar(axis: Axes, position: float, entrant: str, size: float, part: float):
    """One bar with its number; an arrow before it where the bar was cut."""
    shown = min(size, SLOWEST_SHOWN)
    bar = axis.barh(position, shown, height=0.85, color=colour(entrant))
    if part:
        hatched = min(part, SLOWEST_SHOWN)
        axis.barh(position, hatched, height=0.85, facecolor="none", edgecolor="white", hatch="////", linewidth=0)
    text = f"{size:.2f}" if size == shown else f"\N{RIGHTWARDS ARROW} {size:.0f}"
    bold = {"weight": "bold"} if entrant == OURS else {}
    offset = {"xytext": (4, 0), "textcoords": "offset points"}
    axis.annotate(text, (shown, position), va="center", fontsize="x-small", bbox=NUMBER, **offset, **bold)
    return bar


def _legend(figure: Figure, handles: dict) -> None:
    """Right of everything, ours first."""
    names = sorted(handles, key=lambda name: name != OURS)
    figure.legend([handles[name] for name in names], names, loc="outside right center", fontsize="small")


def _panels(count: int, *, width: float, height: float, right: float = 0.0):
    """A figure of that many axes, two a line, with room for a legend at the right."""
    from matplotlib.figure import Figure

    columns = min(count, 2)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns + right, height * lines + 0.4), layout="constrained")
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
