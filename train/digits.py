"""scikit-learn's 1,797 scanned digits as visual questions, in the formats the real pipeline reads.

`write_digits` writes LLaVA JSON (`train.json`, `test.json`), one PNG per digit, and the lmms-eval tasks that ask
about the held-out ones. Both questions about a digit stay on the same side of the split, so no held-out image is ever
seen in training.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from libmoe_fast.errors import ConfigError

QUESTIONS = {"digit": "What digit is this?", "parity": "Is this digit odd or even?"}
VOCAB_TEXTS = tuple([*QUESTIONS.values(), "0 1 2 3 4 5 6 7 8 9", "odd even"] * 20)

_TASKS = Path(__file__).parent / "presets" / "tasks"
_PIXELS = 32
_FORMAT = 1  # raise it when what is written changes, so that an older folder is rewritten


class DigitsPaths(NamedTuple):
    """Where the data set lies: LLaVA JSON files, the folder their `image` fields start from, lmms-eval task files."""

    train: Path
    test: Path
    images: Path
    tasks: Path


def answer(task: str, digit: int) -> str:
    """The right answer to `QUESTIONS[task]`."""
    return str(digit) if task == "digit" else ("even", "odd")[digit % 2]


def write_digits(
    folder: str | os.PathLike, *, held_out: int = 300, limit: int | None = None, seed: int = 0
) -> DigitsPaths:
    """Write the data set under `folder` and return its paths; a folder already written alike is left alone.

    The folder appears in one rename, so an interrupted call leaves nothing that looks finished.

    Args:
        held_out: images kept for `test.json`, drawn with `seed`.
        limit: use only so many of the 1,797 images (for tests); `None`: all.

    Raises:
        ConfigError: `held_out` leaves no image to train on, or `folder` holds something else.
    """
    from sklearn.datasets import load_digits

    folder = Path(folder)
    paths = DigitsPaths(folder / "train.json", folder / "test.json", folder, folder / "tasks")
    recipe = {"format": _FORMAT, "held_out": held_out, "limit": limit, "seed": seed}
    if _written_with(folder) == recipe:
        return paths
    digits = load_digits()
    total = len(digits.target) if limit is None else limit
    if not 0 < held_out < total <= len(digits.target):
        raise ConfigError(
            f"cannot hold out {held_out} of {total} digits: expected 0 < held_out < images used <= {len(digits.target)}"
        )
    if folder.exists() and any(folder.iterdir()) and _written_with(folder) is None:
        raise ConfigError(f"{folder} holds files that are not the digits data set: give an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(staging, digits.images, digits.target, total, held_out, seed)
        (staging / "recipe.json").write_text(json.dumps(recipe))
        if folder.exists():
            shutil.rmtree(folder)
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return paths


def _written_with(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "recipe.json").read_text())
    except (OSError, ValueError):
        return None


def _write(folder: Path, pixels, targets, total: int, held_out: int, seed: int) -> None:
    import numpy as np
    from PIL import Image

    order = np.random.RandomState(seed).permutation(len(targets))[:total]
    (folder / "images").mkdir()
    for i in order:
        grey = Image.fromarray((pixels[i] * (255 / 16)).round().astype("uint8"))  # 8 x 8, values 0..16
        grey.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC).convert("RGB").save(folder / "images" / _name(i))
    for split, chosen in {"test": order[:held_out], "train": order[held_out:]}.items():
        records = [_record(int(i), int(targets[i]), task) for i in chosen for task in QUESTIONS]
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))
    shutil.copytree(_TASKS, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    folder.chmod(0o755)  # mkdtemp makes private folders


def _record(index: int, digit: int, task: str) -> dict:
    return {
        "id": f"{index:04d}-{task}",
        "image": f"images/{_name(index)}",
        "category": str(digit),  # not LLaVA's: evaluation sorts the expert-selection statistics by it
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTIONS[task]}"},
            {"from": "gpt", "value": answer(task, digit)},
        ],
    }


def _name(index: int) -> str:
    return f"{index:04d}.png"
