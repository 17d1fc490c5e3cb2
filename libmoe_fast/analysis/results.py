"""The files an evaluation leaves in its folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = "results.json"  # scores by column, and lmms-eval's results in full
ROUTING = "routing.json"  # analysis.RoutingCounts
ANSWERS = "answers"  # folder of libmoe_fast.answers
EXPORTS = "exports"  # of a run: step-N/, the model in the middle of training, each with its own eval/
HELD_OUT = "held_out.jsonl"  # of a run: {"step": steps done, "loss": mean over the answers' tokens}
DROPPED = "without_top1"  # in results.json, where each token's first expert was taken away
FORMAT = 1


def exports_of(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what a run wrote in the middle of training, by step."""
    found = ((path.name.removeprefix("step-"), path) for path in (folder / EXPORTS).glob("step-*"))
    return sorted((int(step), path) for step, path in found if step.isdigit())


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """A checkpoint's folder itself; of a run's folder, its exports in the order of their steps, and final/."""
    folder = Path(folder)
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return [folder]
    exports = [path for _, path in exports_of(folder)]
    return [*exports, *([folder / "final"] if (folder / "final").exists() or not exports else [])]


def run_folder(checkpoint: Path) -> Path:
    """The run of its final/ or of one of its exports."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == EXPORTS else parent


def evaluation_folder(checkpoint: Path, *, drop_top1: bool = False) -> Path:
    """Where a checkpoint's evaluation goes: eval/ beside it, or inside of one that lies among others."""
    checkpoint = checkpoint.resolve()
    home = checkpoint if checkpoint.parent.name == EXPORTS else checkpoint.parent
    return home / ("eval-without-top1" if drop_top1 else "eval")


def read_results(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What `libmoe-fast evaluate` left in `folder`; None if there is nothing, or another program's results.json."""
    try:
        content = json.loads((Path(folder) / RESULTS).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(content, dict) and content.get("format") == FORMAT and "scores" in content
    return content if ours else None
