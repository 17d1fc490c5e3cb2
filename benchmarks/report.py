"""results.md: the table at a glance, then every row, growth, and who could not take part and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from libmoe_fast.benchmarks import plots
from libmoe_fast.benchmarks.arena import COPY, OURS
from libmoe_fast.benchmarks.measure import Spread
from libmoe_fast.benchmarks.results import Results, Row, growth_of, milliseconds
from libmoe_fast.files import write_atomically

NOTES = """\
- limit: the same FLOPs as dense `mm(out=)` for experts and layers; the same bytes as a memory copy for routing and
  permutation; the dense model, which does 1/K of the experts' FLOPs, for encoder and training step. It runs right
  before every timed run, and time / limit is taken round by round. Lower is better.
- time: median over the rounds, quartiles in brackets. vs best peer: below 1, ours is faster than everything else here.
- All engines get the same tokens, weights and routing; peers route in plain PyTorch, with the same auxiliary losses.
- timed once: a peer far behind, whose first run, without warm-up, is all there is of it.
- peak: the most that a run holds at a time beyond what was there before it, gradients included; on the CPU resident
  memory, with what allocators keep for the next run. saved: what autograd keeps between forward and backward, the input
  included, parameters not."""

TITLES = {
    "routing": "Routing alone",
    "permutation": "Permutation alone",
    "experts": "Experts alone",
    "layer": "Whole layer",
    "encoder": "Vision encoder, two layers, before and after upcycling",
    "training": "Training step of a tiny LLaVA",
}


def write_report(results: Results, out: Path) -> None:
    """results.json, results.md and the plots that the rows suffice for."""
    out.mkdir(parents=True, exist_ok=True)
    results.write(out / "results.json")
    drawn = [name for name, draw in plots.PLOTS.items() if draw(results.rows, out / name)]
    pictures = "".join(f"\n![{name}]({name})\n" for name in drawn)
    write_atomically(out / "results.md", markdown(results) + pictures)


def markdown(results: Results) -> str:
    """The whole report without its pictures."""
    rows = [row for row in results.rows if not row.sweep]
    parts = [f"# libmoe_fast benchmarks, preset {results.preset}", machine(results), at_a_glance(rows), NOTES]
    for subject, group in itertools.groupby(rows, key=lambda row: row.subject):
        parts += [f"## {TITLES[subject]}", details(list(group))]
    if growth := list(growth_of(results.rows)):
        parts += ["## Growth of the time per token", growth_table(growth)]
    if results.skipped:
        parts += ["## Not measured", skipped_table(results)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """What the command line prints: machine, table at a glance, growth, and who could not take part."""
    parts = [machine(results), at_a_glance([row for row in results.rows if not row.sweep])]
    if growth := list(growth_of(results.rows)):
        parts.append(growth_table(growth))
    if results.skipped:
        parts.append(skipped_table(results))
    return "\n\n".join(parts)


def machine(results: Results) -> str:
    """Where the numbers are from, in two sentences."""
    e = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items() if version)
    gpu = f"{e['gpu']}, " if e["gpu"] else ""
    return (
        f"{gpu}{e['cpu']}, {e['threads']} threads of {e['cores']} cores, load before the run {e['load_before']}. "
        f"Python {e['python']}, {versions}."
    )


def at_a_glance(rows: Sequence[Row]) -> str:
    """One line per case: ours beside the best of the others."""
    lines = []
    for _, group in by_case(rows):
        ours = next((row for row in group if row.entrant == OURS), None)
        if ours is None:
            continue
        peers = [row for row in group if row.entrant not in (OURS, COPY)]
        best = min(peers, key=lambda row: row.over_limit.median, default=None)
        lines.append(
            [
                describe(ours),
                spread_ms(ours.time),
                ours.limit,
                spread(ours.over_limit),
                f"{best.entrant} ({best.over_limit.median:.2f})" if best else "-",
                "-" if ours.over_best is None else f"{ours.over_best:.2f}",
                f"{ours.tokens_per_second:,.0f}",
            ]
        )
    headers = ["case", "ours (ms)", "limit", "time / limit", "best peer (its time / limit)", "vs best peer", "tokens/s"]
    return table(headers, lines, left=(0, 2, 4))


def details(rows: Sequence[Row]) -> str:
    """Every entrant of every case, fastest first."""
    lines = []
    for _, group in by_case(rows):
        shown = describe(group[0])
        first = group[0]
        lines.append([shown, f"limit: {first.limit}", spread_ms(first.limit_time), "1", "-", "-", "-", "-"])
        for row in sorted(group, key=lambda row: row.over_limit.median):
            lines.append(
                [
                    "",
                    row.entrant + " (timed once)" * (row.rounds == 1),
                    spread_ms(row.time),
                    spread(row.over_limit),
                    "-" if row.over_best is None else f"{row.over_best:.2f}",
                    mebibytes(row.peak_bytes),
                    mebibytes(row.saved_bytes),
                    "-" if row.entrant == COPY else f"{row.tokens_per_second:,.0f}",
                ]
            )
    headers = ["case", "", "time (ms)", "time / limit", "vs best peer", "peak (MiB)", "saved (MiB)", "tokens/s"]
    return table(headers, lines, left=(0, 1))


def growth_table(series) -> str:
    lines = [
        [
            g.letter,
            g.entrant,
            " ".join(map(str, g.values)),
            " ".join(f"{s * 1e6:.2f}" for s in g.seconds_per_token),
            f"{g.exponent:+.2f}",
            str(g.expected),
        ]
        for g in series
    ]
    headers = ["size", "", "values", "µs per token", "exponent", "that of the work"]
    return table(headers, lines, left=(0, 1, 2, 3))


def skipped_table(results: Results) -> str:
    """One line per entrant and reason, with the number of cases."""
    key = lambda s: (s.entrant, s.reason)  # noqa: E731
    groups = itertools.groupby(sorted(results.skipped, key=key), key=key)
    return table(
        ["", "why", "cases"], [[entrant, reason, str(len(list(g)))] for (entrant, reason), g in groups], left=(0, 1)
    )


def by_case(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    for case, group in itertools.groupby(rows, key=lambda row: row.case):
        yield case, list(group)


def describe(row: Row) -> str:
    """`Whole layer, CLIP-L, T 577, bf16, fwd+bwd`, with what differs from the usual."""
    router = f", {row.router}" if row.subject in ("routing", "layer") else ""
    return f"{row.subject}, {row.shape}, T {row.tokens}, {row.dtype}, {row.mode}{router}"


def spread(value: Spread) -> str:
    return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"


def spread_ms(value: Spread) -> str:
    return f"{milliseconds(value.median)} [{milliseconds(value.low)}, {milliseconds(value.high)}]"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.1f}"


def table(headers: list[str], rows: list[list[str]], *, left: tuple[int, ...]) -> str:
    from tabulate import tabulate

    alignment = ["left" if i in left else "right" for i in range(len(headers))]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment if rows else None)
