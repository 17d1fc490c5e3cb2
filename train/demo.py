"""The whole pipeline on real images, on a laptop's CPU: `python -m libmoe_fast.train.demo`.

Handwritten digits as visual questions; a tiny LLaVA trained through the three stages, stage 3 once per router; each
checkpoint evaluated through lmms-eval on held-out digits; one report. Every part is a command a user could type, run
as its own process, and is kept when finished: the demo can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from libmoe_fast.analysis.results import RESULTS, read_results
from libmoe_fast.errors import ConfigError, LibMoEError
from libmoe_fast.files import write_atomically
from libmoe_fast.routers import COMPARED
from libmoe_fast.train.digits import QUESTIONS, VOCAB_TEXTS, DigitsPaths, write_digits

SHORT_ROUTERS = ("smoe", "hyper")  # one with auxiliary losses, and the one with a schedule of its own
SHORT_STEPS = {"stage1": 10, "stage2": 150, "stage3": 30}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command of the demo, and the file or folder that is there once it has finished."""

    title: str
    command: tuple[str, ...]
    result: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m libmoe_fast.train.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for everything (runs/demo; with --short runs/demo-short)")
    parser.add_argument(
        "--short", action="store_true", help="two routers, few steps: every part runs, little is learnt"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path("runs", "demo-short" if options.short else "demo")
    try:
        run_demo(out, short=options.short)
    except LibMoEError as error:
        print(f"libmoe-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the part that was running", file=sys.stderr)
        return 130
    return 0


def run_demo(out: Path, *, short: bool = False) -> None:
    """Run all parts that have not finished yet, and print the report.

    Raises:
        ConfigError: `out` holds a demo with other settings.
        LibMoEError: a part failed; its messages are in logs/.
    """
    started = time.monotonic()
    _claim(out, short)
    data = write_digits(out / "data")
    write_model(out / "model")
    all_parts = parts(out, data, short=short)
    for number, part in enumerate(all_parts, 1):
        _run(part, f"[{number}/{len(all_parts)}]", out / "logs")
    from libmoe_fast.analysis.report import make_report

    print(f"\n{make_report(out)}\n")
    print(f"{time.monotonic() - started:.0f} s in all. Table, figures and numbers: {out / 'report.html'}")
    print(f"Training: tensorboard --logdir {out}; the same table again: libmoe-fast report {out}")


def write_model(folder: Path) -> None:
    """The tiny LLaVA with random weights that stage 1 starts from, unless it is there."""
    if (folder / "config.json").exists():
        return
    from transformers.utils import logging

    from libmoe_fast import save_model
    from libmoe_fast.train.tiny import tiny_llava

    logging.disable_progress_bar()
    model, processor = tiny_llava("clip", vocab_texts=VOCAB_TEXTS)
    save_model(model, folder, processor=processor)


def parts(out: Path, data: DigitsPaths, *, short: bool) -> list[Part]:
    """The demo's commands, in order."""
    routers = SHORT_ROUTERS if short else COMPARED

    def train(preset: str, name: str, start: Path, *options: str) -> Part:
        steps = ("--optim.max_steps", str(SHORT_STEPS[preset])) if short else ()
        command = (
            *("train", "--config", f"demo_{preset}", "--model.path", str(start), *options),
            *("--data.file", str(data.train), "--run.folder", str(out / name), *steps),
        )
        return Part(title=f"train {name}", command=command, result=out / name / "final")

    def evaluate(name: str) -> Part:
        command = (
            *("evaluate", str(out / name), "--tasks", "digit", "parity"),  # and what it exported on the way
            *("--include_path", str(data.tasks), "--batch_size", "64", "--record_choices"),
        )
        return Part(title=f"evaluate {name}", command=command, result=out / name / "eval" / "results.json")

    dense = out / "stage2" / "final"
    return [
        train("stage1", "stage1", out / "model"),
        train("stage2", "stage2", out / "stage1" / "final"),
        evaluate("stage2"),
        *(train("stage3", router, dense, "--model.router", router) for router in routers),
        *(evaluate(router) for router in routers),
    ]


def _claim(out: Path, short: bool) -> None:
    """Notes the settings in `out`: finished parts are kept only where the same settings would make them again."""
    presets = sorted((Path(__file__).parent / "presets").glob("demo_*.yaml"))
    settings = {"short": short, "presets": {preset.stem: preset.read_text() for preset in presets}}
    file = out / "demo.json"
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=1))
    elif json.loads(file.read_text()) != settings:
        raise ConfigError(f"{out} holds a demo with other settings: remove it, or give another folder with --out")


def _run(part: Part, place: str, logs: Path) -> None:
    if _is_done(part):
        print(f"{place} {part.title}: done before", flush=True)
        return
    print(f"{place} {part.title}: libmoe-fast {shlex.join(part.command)}", flush=True)
    started = time.monotonic()
    log = logs / f"{part.title.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Operators this small only lose time to more threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w") as file:
        output = None if sys.stderr.isatty() else file  # a person sees the progress bars
        command = [sys.executable, "-m", "libmoe_fast.cli", *part.command]
        code = _wait(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
    if code or not _is_done(part):
        raise LibMoEError(f"{part.title} failed with exit code {code}{_last_lines(log)}")
    print(f"{place} {part.title}: {time.monotonic() - started:.0f} s", flush=True)


def _is_done(part: Part) -> bool:
    """Its result is there; of an evaluation, which is written task by task, with every score."""
    if part.result.name != RESULTS:
        return part.result.exists()
    found = read_results(part.result.parent)
    return found is not None and not found.get("failures") and len(found["scores"]) == len(QUESTIONS)


def _wait(process: subprocess.Popen) -> int:
    """Its exit code. Ctrl-C reaches the process too: it is given the time to save."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _last_lines(log: Path, count: int = 5) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "".join(f"\n  {line}" for line in lines[-count:]) if lines else "; see its messages above"


if __name__ == "__main__":
    sys.exit(main())
