"""The whole pipeline on real images, on a laptop's CPU: `python -m libmoe_fast.train.demo`.

Handwritten digits as visual questions; tiny LLaVAs with CLIP and with SigLIP trained through the three stages, stage 3
once per router and seed; ten checkpoints of each evaluated through lmms-eval on held-out digits; one report. Every part
is a command a user could type, run as its own process, and is kept when finished: the demo can be stopped and started
again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from libmoe_fast.analysis.results import RESULTS, read_results
from libmoe_fast.errors import ConfigError, LibMoEError
from libmoe_fast.files import write_atomically
from libmoe_fast.routers import COMPARED, ROUTERS
from libmoe_fast.train.digits import QUESTIONS, VOCAB_TEXTS, DigitsPaths, write_digits

POLL = 0.2  # seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a demo compares, and for how long it trains."""

    encoders: tuple[str, ...]
    routers: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)  # stage -> further options of `train`


FULL = Plan(encoders=("clip", "siglip"), routers=COMPARED, seeds=(0, 1))
SHORT = Plan(
    encoders=("clip",),
    routers=("smoe", "hyper"),  # one with auxiliary losses, and the one with a schedule of its own
    seeds=(0,),
    options={
        "stage1": ("--optim.max_steps", "10"),
        "stage2": ("--optim.max_steps", "150"),
        "stage3": ("--optim.max_steps", "30", "--run.export_at", "[0.5]"),
    },
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command of the demo, what must be there before it starts, and what is there once it has finished."""

    title: str
    command: tuple[str, ...]
    needs: tuple[Path, ...]
    results: tuple[Path, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m libmoe_fast.train.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for everything (runs/demo; with --short runs/demo-short)")
    parser.add_argument(
        "--short",
        action="store_true",
        help="one encoder, two routers, one seed, few steps: every part runs, little is learnt",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="parts that run side by side, of one thread each (cores)"
    )
    parser.add_argument(
        "--routers",
        nargs="+",
        choices=(*ROUTERS, "all"),
        metavar="NAME",
        help=f"compare these instead: {', '.join(ROUTERS)}, or all (another --out for another choice)",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1")
    out = options.out or Path("runs", "demo-short" if options.short else "demo")
    try:
        run_demo(out, short=options.short, jobs=options.jobs, routers=options.routers)
    except LibMoEError as error:
        print(f"libmoe-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the parts that were running", file=sys.stderr)
        return 130
    return 0


def run_demo(out: Path, *, short: bool = False, jobs: int = 1, routers: Sequence[str] | None = None) -> None:
    """Run all parts that have not finished yet, and print the report. routers: instead of the plan's.

    Raises:
        ConfigError: `out` holds a demo with other settings.
        LibMoEError: a part failed; its messages are in logs/.
    """
    started = time.monotonic()
    plan = SHORT if short else FULL
    if routers:
        plan = replace(plan, routers=tuple(ROUTERS) if "all" in routers else tuple(dict.fromkeys(routers)))
    _claim(out, plan)
    data = write_digits(out / "data")
    for encoder in plan.encoders:
        write_model(out / encoder / "model", encoder)
    run_parts(parts(out, data, plan), out / "logs", jobs=jobs)
    from libmoe_fast.analysis.report import make_report

    print(f"\n{make_report(out)}\n")
    print(f"{time.monotonic() - started:.0f} s in all. Table, figures and numbers: {out / 'report.html'}")
    print(f"Training: tensorboard --logdir {out}; the same table again: libmoe-fast report {out}")


def write_model(folder: Path, encoder: str) -> None:
    """The tiny LLaVA with random weights that stage 1 starts from, unless it is there."""
    if (folder / "config.json").exists():
        return
    from transformers.utils import logging

    from libmoe_fast import save_model
    from libmoe_fast.train.tiny import tiny_llava

    logging.disable_progress_bar()
    model, processor = tiny_llava(encoder, vocab_texts=VOCAB_TEXTS)
    save_model(model, folder, processor=processor)


def parts(out: Path, data: DigitsPaths, plan: Plan) -> list[Part]:
    """The demo's commands: those that others wait for first."""

    def train(stage: str, name: str, start: Path, *options: str) -> Part:
        command = (
            *("train", "--config", f"demo_{stage}", "--model.path", str(start), *options),
            *("--data.file", str(data.train), "--run.folder", str(out / name), *plan.options.get(stage, ())),
        )
        return Part(title=f"train {name}", command=command, needs=(start,), results=(out / name / "final",))

    def evaluate(title: str, names: list[str], *options: str, inside: str = "", into: str = "eval") -> Part:
        """Runs, with what they exported on the way, or their final/ alone: many in one process, which takes a while to
        start."""
        checkpoints = [str(out / name / inside) for name in names]
        command = (
            *("evaluate", *checkpoints, "--tasks", "digit", "parity", "--include_path", str(data.tasks)),
            *("--batch_size", "64", *options),
        )
        finals, results = (tuple(out / name / end for name in names) for end in ("final", Path(into, RESULTS)))
        return Part(title=f"evaluate {title}", command=command, needs=finals, results=results)

    first, second, third, last = [], [], [], []
    for encoder in plan.encoders:
        first.append(train("stage1", f"{encoder}/stage1", out / encoder / "model"))
        first.append(train("stage2", f"{encoder}/stage2", out / encoder / "stage1" / "final"))
        second.append(evaluate(f"{encoder}/stage2", [f"{encoder}/stage2"]))
        moe = []
        for router in plan.routers:
            for seed in plan.seeds:
                moe.append(f"{encoder}/{router}-seed{seed}")
                options = ("--model.router", router, "--run.seed", str(seed))
                third.append(train("stage3", moe[-1], out / encoder / "stage2" / "final", *options))
        last.append(evaluate(f"{encoder} experts", moe, "--record_choices", "--record_outputs"))
        without = {"inside": "final", "into": "eval-without-top1"}
        last.append(evaluate(f"{encoder} without first experts", moe, "--drop_top1", **without))
    return [*first, *second, *third, *last]


def _claim(out: Path, plan: Plan) -> None:
    """Notes the settings in `out`: finished parts are kept only where the same settings would make them again."""
    presets = sorted((Path(__file__).parent / "presets").glob("demo_*.yaml"))
    settings = {"plan": asdict(plan), "presets": {preset.stem: preset.read_text() for preset in presets}}
    settings = json.loads(json.dumps(settings))  # tuples are lists there
    file = out / "demo.json"
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=1))
    elif json.loads(file.read_text()) != settings:
        raise ConfigError(f"{out} holds a demo with other settings: remove it, or give another folder with --out")


def run_parts(todo: Sequence[Part], logs: Path, *, jobs: int) -> None:
    """Runs each part when what it needs is there, `jobs` at a time; those that finished before are kept.

    Ctrl-C, and a part that fails, stop the others too, which save what they have.
    """
    from tqdm import tqdm

    waiting = [part for part in todo if not _is_done(part)]
    running: dict[subprocess.Popen, tuple[Part, float]] = {}
    with tqdm(total=len(todo), initial=len(todo) - len(waiting), desc="Demo", unit="part") as bar:
        try:
            while waiting or running:
                ready = [part for part in waiting if all(path.exists() for path in part.needs)]
                for part in ready[: jobs - len(running)]:
                    waiting.remove(part)
                    running[_start(part, logs)] = (part, time.monotonic())
                now = ", ".join(part.title for part, _ in running.values())
                if now != bar.postfix:
                    bar.set_postfix_str(now)
                time.sleep(POLL)
                for process in [process for process in running if process.poll() is not None]:
                    part, started = running.pop(process)
                    _check(part, process.returncode, logs)
                    bar.write(
                        f"{part.title}: {time.monotonic() - started:.0f} s: libmoe-fast {shlex.join(part.command)}"
                    )
                    bar.update()
        finally:
            for process in running:
                process.send_signal(signal.SIGINT)
            for process in running:
                process.wait()


def _start(part: Part, logs: Path) -> subprocess.Popen:
    # Operators this small only lose time to more threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    log = _log_of(part, logs)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "libmoe_fast.cli", *part.command]
    with log.open("w") as file:
        # A session of its own: Ctrl-C at a terminal reaches it through run_parts alone, once.
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def _check(part: Part, code: int, logs: Path) -> None:
    if code or not _is_done(part):
        raise LibMoEError(f"{part.title} failed with exit code {code}{_last_lines(_log_of(part, logs))}")


def _log_of(part: Part, logs: Path) -> Path:
    return logs / f"{part.title.replace(' ', '-').replace('/', '-')}.log"


def _is_done(part: Part) -> bool:
    """Its results are there; of an evaluation, which is written task by task, with every score."""
    return all(_scored(path.parent) if path.name == RESULTS else path.exists() for path in part.results)


def _scored(folder: Path) -> bool:
    found = read_results(folder)
    return found is not None and not found.get("failures") and len(found["scores"]) == len(QUESTIONS)


def _last_lines(log: Path, count: int = 5) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "".join(f"\n  {line}" for line in lines[-count:]) if lines else "; see its messages above"


if __name__ == "__main__":
    sys.exit(main())
