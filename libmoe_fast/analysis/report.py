"""`libmoe-fast report RUN_DIR`: tables over all runs in a folder, with LibMoE's figures, as HTML, Markdown and more.

report.html                 all of it in one file, figures included
report.md, *.png            the same as Markdown
report.csv, report.tex      the table, for a spreadsheet and for a paper
report.json                 every number, with the files that it comes from
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libmoe_fast.analysis import figures
from libmoe_fast.analysis.results import RESULTS, ROUTING
from libmoe_fast.analysis.routing_figures import changed_choices, routing_figures
from libmoe_fast.analysis.runs import LOG, Run, find_runs
from libmoe_fast.analysis.significance import differences, over_seeds
from libmoe_fast.columns import BENCHMARKS, SUITES
from libmoe_fast.errors import ConfigError
from libmoe_fast.files import write_atomically

MISSING = "missing"
AVERAGE = "average"
_POINTS = "MME"  # scored in points, which an average of percentages leaves out
_NOTES = """\
- average: over LibMoE's benchmarks without MME, which is in points; where a run lacks one it has no average. The best
  of the MoE runs is **bold**.
- H_total: eq. 5 of LibMoE (arXiv 2411.00918), the mean over layers of the entropy of the expert-selection
  frequencies, in bits, over the tokens of all evaluated images. log2(N) is even use; lower is more specialised.
- load imbalance: the busiest expert's load over the mean load, averaged over layers, same tokens. 1 is even; N / K is
  the worst case.
- confidence: the entropy of a token's gate probabilities in bits, averaged over tokens, images and layers (figure 6 of
  LibMoE; scores of `hyper` by their softmax, sigmoids by their sum); margin: first gate weight minus second;
  similarity: the cosine of the outputs of a token's chosen experts, averaged over their pairs (`--record_outputs`).
- differences: the best MoE run against the others, over the same questions, 2,000 times drawn anew for both (paired
  bootstrap); noise: the interval holds 0. Over seeds: mean ± standard deviation of runs with the same settings.
- experts' weights: |W_e - W| / |W| of both layers of each expert, W those of the dense MLP that it was copied from, and
  |W_e - W_f| / |W| between experts.
- step: median time of a training step, from the run's log, on the machine and under the load it ran with."""


def make_report(folder: str | Path, *, out: str | Path | None = None) -> str:
    """Write the report's files and figures into `out` (default: `folder`); return the table as text.

    Raises:
        ConfigError: `folder` holds no run.
    """
    runs = find_runs(folder)
    out = Path(folder if out is None else out)
    title = Path(folder).resolve().name
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = [
            (name, caption)
            for name, caption, draw in (
                ("training.png", "Training", figures.training_curves),
                ("progress.png", "Scores over training (LibMoE, figures 3 and 9)", figures.progress),
                ("experts.png", "Expert shares", figures.expert_shares),
            )
            if draw(runs, out / name)
        ]
        drawn += routing_figures(runs, out)
        table = score_table(runs)
        others = {
            "Over seeds": seeds_table(runs),
            "Differences, and whether questions drawn anew would show them": differences_table(runs),
            "Without each token's first expert": dropped_table(runs),
            "Best checkpoints": best_table(runs),
            "Choices changed since the checkpoint before": changes_table(runs),
            "Routing by task": routing_table(runs),
            "How far the experts' weights have moved": weights_table(runs),
        }
        write_atomically(out / "report.json", json.dumps([_details(run) for run in runs], indent=1))
        write_atomically(out / "report.md", _markdown(title, table, others, drawn))
        write_atomically(out / "report.csv", _csv(table))
        write_atomically(out / "report.tex", _render(table, "latex_booktabs", bold="\\textbf{{{}}}") + "\n")
        write_atomically(out / "report.html", _html(title, table, others, drawn, out))
    except OSError as error:
        raise ConfigError(f"cannot write the report into {out}: {error.strerror or error}") from error
    return render_table(runs)


def render_table(runs: Sequence[Run]) -> str:
    """The runs with scores or experts, dense ones first, as a table for a terminal."""
    return _render(score_table(runs), "github")


Table = tuple[list[str], list[list[str]], set[tuple[int, int]]]  # headers, rows of cells, the cells that are best


def score_table(runs: Sequence[Run]) -> Table:
    """Scores in the order of LibMoE's table 2, their average, and how experts are used."""
    shown = sorted((r for r in runs if r.scores or r.router), key=lambda r: r.router is not None) or list(runs)
    order = list(BENCHMARKS)
    found = dict.fromkeys(column for run in shown for column in run.scores)
    columns = sorted(found, key=lambda c: order.index(c) if c in order else len(order))
    averaged = [column for column in columns if column in SUITES["libmoe"] and column != _POINTS]
    averages = {run.name: _average(run, averaged) for run in shown} if len(averaged) > 1 else {}
    encoders = len({run.encoder for run in shown if run.encoder}) > 1
    rows = []
    for run in shown:
        dense = run.router is None
        rows.append(
            [
                run.name,
                run.router or "dense",
                *([run.encoder or "?"] if encoders else []),
                *(_number(run.scores.get(column), ".1f") for column in columns),
                *([_number(averages[run.name], ".2f")] if averages else []),
                "-" if dense else _number(run.imbalance, ".3f"),
                "-" if dense else _number(run.entropy_total, ".4f"),
                _number(run.step_milliseconds, ".1f"),
            ]
        )
    first = 2 + encoders
    best = set()
    for i in range(len(columns) + bool(averages)):
        values = {
            n: averages.get(run.name) if i == len(columns) else run.scores.get(columns[i])
            for n, run in enumerate(shown)
            if run.router is not None
        }
        values = {n: value for n, value in values.items() if value is not None}
        if len(values) > 1:
            best |= {(n, first + i) for n, value in values.items() if value == max(values.values())}
    extra = ["encoder"] if encoders else []
    headers = ["run", "router", *extra, *columns, *([AVERAGE] if averages else [])]
    return [*headers, "load imbalance", "H_total", "step (ms)"], rows, best


def _average(run: Run, columns: Sequence[str]) -> float | None:
    return statistics.fmean(run.scores[c] for c in columns) if all(c in run.scores for c in columns) else None


def best_table(runs: Sequence[Run]) -> Table:
    """Per run and column, and for the held-out loss: when it was best, and what stopping there would have gained."""
    rows = []
    for run in runs:
        for column in dict.fromkeys(c for scores in run.history.values() for c in scores):
            points = run.over_training(column)
            if len(points) > 1 and column in run.scores:
                share, score = max(points, key=lambda point: point[1])
                gain = score - run.scores[column]
                rows.append([run.name, column, f"{100 * share:.0f}%", f"{score:.2f}", f"{gain:+.2f}"])
        if len(run.held_out) > 1:
            share, loss = min(run.held_out, key=lambda point: point[1])
            gain = loss - run.held_out[-1][1]
            rows.append([run.name, "held-out loss", f"{100 * share:.0f}%", f"{loss:.4f}", f"{gain:+.4f}"])
    return ["run", "benchmark", "best after", "score", "over the last"], rows, set()


def seeds_table(runs: Sequence[Run]) -> Table:
    """Runs that differ in their seed only: mean and spread (standard deviation) of each score."""
    groups = over_seeds(runs)
    columns = list(dict.fromkeys(column for group in groups for run in group for column in run.scores))
    rows = []
    for group in groups:
        values = [[run.scores[column] for run in group if column in run.scores] for column in columns]
        cells = [f"{statistics.fmean(v):.1f} ± {statistics.stdev(v):.1f}" if len(v) > 1 else MISSING for v in values]
        rows.append([group[0].router or "dense", ", ".join(run.name for run in group), *cells])
    return ["router", "runs", *columns], rows, set()


def differences_table(runs: Sequence[Run]) -> Table:
    """The best run of each column against the others, by a paired bootstrap over the questions."""
    rows = []
    for column, best, other, (difference, low, high) in differences(runs):
        verdict = "inside noise" if low <= 0 <= high else "beyond it"
        rows.append([column, f"{best.name} - {other.name}", f"{difference:.2f}", f"{low:.2f} to {high:.2f}", verdict])
    return ["benchmark", "runs", "difference", "95% interval", "noise"], rows, set()


def dropped_table(runs: Sequence[Run]) -> Table:
    """What the first expert of each token was worth: scores with it and without."""
    rows = [
        [run.name, column, _number(run.scores.get(column), ".2f"), f"{without:.2f}", _drop(run, column)]
        for run in runs
        for column, without in run.without_top1.items()
    ]
    return ["run", "benchmark", "score", "without", "drop"], rows, set()


def _drop(run: Run, column: str) -> str:
    return f"{run.scores[column] - run.without_top1[column]:.2f}" if column in run.scores else MISSING


def changes_table(runs: Sequence[Run]) -> Table:
    """Per run and task, the last checkpoint since the one before it: the mean over layers, and the most changed one."""
    rows = []
    for run in runs:
        for task, points in changed_choices(run).items():
            since, share, slots, sets = points[-1]
            most = int(slots.argmax())
            layer = figures.short_layer_name(run.counts.layers[most])
            percent = [f"{100 * slots.mean():.1f}", f"{100 * sets.mean():.1f}", f"{layer}: {100 * slots[most]:.1f}"]
            rows.append([run.name, task, f"{100 * since:.0f} to {100 * share:.0f}%", *percent])
    headers = [
        "run",
        "task",
        "training",
        "other expert in its slot (%)",
        "left the chosen (%)",
        "most changed layer (%)",
    ]
    return headers, rows, set()


def routing_table(runs: Sequence[Run]) -> Table:
    """Per run and task: how its image tokens were routed."""
    rows = [
        [
            run.name,
            row["task"],
            f"{row['images']:,}",
            _number(row["H_total"], ".4f"),
            _number(row["load_imbalance"], ".3f"),
            _number(row["confidence_entropy"], ".4f"),
            _number(row["margin"], ".4f"),
            _number(row["similarity"], ".4f"),
        ]
        for run in runs
        for row in run.routing_by_task()
    ]
    return (
        ["run", "task", "images", "H_total", "load imbalance", "confidence (bits)", "margin", "similarity"],
        rows,
        set(),
    )


def weights_table(runs: Sequence[Run]) -> Table:
    """Per run, relative distances of the experts' weights: means over experts and layers, and the most moved layer."""
    rows = []
    for run in runs:
        if not run.weights:
            continue
        known = {name: found["since_upcycling"] for name, found in run.weights.items() if "since_upcycling" in found}
        moved = {name: statistics.fmean(each) for name, each in known.items()}
        apart = [_off_diagonal(found["between"]) for found in run.weights.values()]
        most = max(moved, key=moved.get) if moved else None
        rows.append(
            [
                run.name,
                run.router or "?",
                _number(statistics.fmean(moved.values()) if moved else None, ".4f"),
                _number(statistics.fmean(apart), ".4f"),
                MISSING if most is None else f"{figures.short_layer_name(most)}: {moved[most]:.4f}",
            ]
        )
    return ["run", "router", "since upcycling", "between experts", "most moved layer"], rows, set()


def _off_diagonal(matrix: Sequence[Sequence[float]]) -> float:
    values = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    return statistics.fmean(values) if values else 0.0


def _render(table: Table, form: str, *, bold: str = "{}") -> str:
    from tabulate import tabulate

    headers, rows, best = table
    marked = [
        [bold.format(cell) if (n, i) in best else cell for i, cell in enumerate(row)] for n, row in enumerate(rows)
    ]
    if form == "latex_booktabs":
        form = "latex_raw"
        headers, marked = [_tex(h) for h in headers], [[_tex(cell) for cell in row] for row in marked]
    return tabulate(marked, headers, tablefmt=form, disable_numparse=True, colalign=_alignment(len(headers)))


def _tex(cell: str) -> str:
    return cell.replace("_", "\\_").replace("%", "\\%")


def _csv(table: Table) -> str:
    headers, rows, _ = table
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([["" if cell in (MISSING, "-") else cell for cell in row] for row in rows])
    return file.getvalue()


def _alignment(columns: int) -> list[str]:
    return ["left", "left"] + ["right"] * (columns - 2)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _details(run: Run) -> dict[str, Any]:
    files = [run.folder / LOG, *run.folder.rglob(RESULTS), *run.folder.rglob(ROUTING)]
    return {
        "run": run.name,
        "router": run.router,
        "encoder": run.encoder,
        "scores": run.scores,
        "history": run.history,
        "load_imbalance": run.imbalance,
        "H_total": run.entropy_total,
        "entropy": run.entropy_details(),
        "routing": run.routing_by_task(),
        "weights": run.weights,
        "step_milliseconds": run.step_milliseconds,
        "steps": run.log[-1]["step"] if run.log else None,
        "last_loss": run.log[-1].get("loss") if run.log else None,
        "files": [str(path) for path in files if path.is_file()],
    }


def _markdown(title: str, table: Table, others: dict[str, Table], drawn: Sequence[tuple[str, str]]) -> str:
    parts = [f"# {title}", _render(table, "github", bold="**{}**"), _NOTES]
    for caption, other in others.items():
        if other[1]:
            parts += [f"## {caption}", _render(other, "github")]
    parts += [f"## {caption}\n\n![{caption}]({name})" for name, caption in drawn]
    return "\n\n".join(parts) + "\n"


_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap }}
th {{ border-bottom: 2px solid #333 }}
img {{ max-width: 100%; display: block }}
ul {{ color: #444; font-size: .9rem }}
</style></head><body>
{body}
</body></html>
"""


def _html(title: str, table: Table, others: dict[str, Table], drawn: Sequence[tuple[str, str]], folder: Path) -> str:
    """One file that needs no other: figures are inside."""
    notes = [note.replace("\n  ", " ") for note in _NOTES.removeprefix("- ").split("\n- ")]
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(table)]
    parts.append("<ul>" + "".join(f"<li>{html.escape(note.replace('**', ''))}</li>" for note in notes) + "</ul>")
    for caption, other in others.items():
        if other[1]:
            parts += [f"<h2>{html.escape(caption)}</h2>", _html_table(other)]
    for name, caption in drawn:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        text = html.escape(caption)
        parts += [f"<h2>{text}</h2>", f'<img alt="{text}" src="data:image/png;base64,{data}">']
    return _PAGE.format(title=html.escape(title), body="\n".join(parts))


def _html_table(table: Table) -> str:
    headers, rows, best = table
    align = ["left" if side == "left" else "right" for side in _alignment(len(headers))]

    def cells(kind: str, row: Sequence[str], number: int | None) -> str:
        made = []
        for i, cell in enumerate(row):
            text = html.escape(cell)
            text = f"<b>{text}</b>" if (number, i) in best else text
            made.append(f'<{kind} style="text-align:{align[i]}">{text}</{kind}>')
        return "<tr>" + "".join(made) + "</tr>"

    body = [cells("td", row, number) for number, row in enumerate(rows)]
    return "<table>" + cells("th", headers, None) + "".join(body) + "</table>"
