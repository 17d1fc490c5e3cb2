"""`libmoe-fast report RUN_DIR`: one table over all runs in a folder, with figures, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libmoe_fast.analysis import figures
from libmoe_fast.analysis.runs import Run, find_runs
from libmoe_fast.errors import ConfigError
from libmoe_fast.files import write_atomically

MISSING = "missing"
_NOTES = """\
- H_total: eq. 5 of LibMoE (arXiv 2411.00918), the mean over layers of the entropy of the expert-selection
  frequencies, in bits, over the tokens of all evaluated images. log2(N) is even use; lower is more specialised.
- load imbalance: the busiest expert's load over the mean load, averaged over layers, same tokens. 1 is even; N / K is
  the worst case.
- step: median time of a training step, from the run's log, on the machine and under the load it ran with."""


def make_report(folder: str | Path, *, out: str | Path | None = None) -> str:
    """Write report.md, report.json and the figures into `out` (default: `folder`); return the table as text.

    Raises:
        ConfigError: `folder` holds no run.
    """
    runs = find_runs(folder)
    out = Path(folder if out is None else out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = [
            name
            for name, draw in (("training.png", figures.training_curves), ("experts.png", figures.expert_shares))
            if draw(runs, out / name)
        ]
        write_atomically(out / "report.json", json.dumps([_details(run) for run in runs], indent=1))
        table = render_table(runs)
        write_atomically(out / "report.md", _markdown(Path(folder), table, drawn))
    except OSError as error:
        raise ConfigError(f"cannot write the report into {out}: {error.strerror or error}") from error
    return table


def render_table(runs: Sequence[Run]) -> str:
    """The runs with scores or experts, dense ones first, as a Markdown table."""
    from tabulate import tabulate

    shown = sorted((r for r in runs if r.scores or r.router), key=lambda r: r.router is not None) or list(runs)
    columns = list(dict.fromkeys(column for run in shown for column in run.scores))
    rows = []
    for run in shown:
        dense = run.router is None
        rows.append(
            [
                run.name,
                run.router or "dense",
                *(_number(run.scores.get(column), ".1f") for column in columns),
                "-" if dense else _number(run.imbalance, ".3f"),
                "-" if dense else _number(run.entropy_total, ".4f"),
                _number(run.step_milliseconds, ".1f"),
            ]
        )
    headers = ["run", "router", *columns, "load imbalance", "H_total", "step (ms)"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=_alignment(len(headers)))


def _alignment(columns: int) -> list[str]:
    return ["left", "left"] + ["right"] * (columns - 2)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _details(run: Run) -> dict[str, Any]:
    return {
        "run": run.name,
        "router": run.router,
        "scores": run.scores,
        "load_imbalance": run.imbalance,
        "H_total": run.entropy_total,
        "entropy": run.entropy_details(),
        "step_milliseconds": run.step_milliseconds,
        "steps": run.log[-1]["step"] if run.log else None,
        "last_loss": run.log[-1].get("loss") if run.log else None,
    }


def _markdown(folder: Path, table: str, drawn: Sequence[str]) -> str:
    titles = {"training.png": "Training", "experts.png": "Expert shares"}
    pictures = "\n\n".join(f"## {titles[name]}\n\n![{titles[name]}]({name})" for name in drawn)
    return f"# {folder.resolve().name}\n\n{table}\n\n{_NOTES}\n\n{pictures}\n"
