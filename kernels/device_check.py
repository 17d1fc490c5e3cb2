"""One command that judges the kernels on a GPU: are they right, and how near is the limit.

    python -m libmoe_fast.kernels.device_check [--out FOLDER] [--steps NAME ...] [--limit 540]      make gpu

Runs in a checkout, where nothing has to be installed (PYTHONPATH=.) and no network is needed. Each step is a process
with a time limit of its own; what fails or takes too long is said, and the next step follows. Verdicts are printed as
they come, and again at the end; results.json, summary.md and log.txt are written after every step, into FOLDER (if not
given, the folder that OUT names, else runs/gpu). Exit code 1 if any step failed. What `make gpu-cache` compiled before,
on a machine without a GPU, is found in runs/gpu-cache, and what had to be compiled here is added to it.

--dry-run is the same script in Triton's interpreter, at tiny sizes: its first run on a GPU is then not its first run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from libmoe_fast.compatibility import installed_version

from .cache import FOLDER, compiled_kernels, settle
from .cache import VARIABLE as CACHE_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "pytest-xdist", "hypothesis")
PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "left out"
WORKER_BYTES = 8 * 2**30  # of the GPU's memory: with float32 at CLIP-L's size, a test process was seen to take so much
METRICS = ("Compute (SM) Throughput", "Memory Throughput", "Achieved Occupancy", "Registers Per Thread", "Duration")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the check runs. dry: in the interpreter; workers: how many test processes share the GPU.

    cache: of compiled kernels, Triton's.
    """

    out: Path
    cache: Path
    dry: bool
    workers: int

    def file(self, name: str) -> Path:
        """A scratch file of a step."""
        return self.out / ".work" / name

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        backend = {"TRITON_INTERPRET": "1"} if self.dry else {}
        return {
            **os.environ,
            **backend,
            CACHE_VARIABLE: str(self.cache),
            "PYTHONPATH": path,
            "LIBMOE_FAST_BACKEND": "triton",
            "PYTHONUNBUFFERED": "1",
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a step. summary: one line or a few; compiled: kernels the cache lacked; data: all its numbers."""

    step: str
    status: str
    summary: str
    seconds: float = 0.0
    compiled: int = 0
    data: Any = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process. command: its arguments; reason: why it cannot run here, if so.

    read: output and exit status -> status, summary and data of the verdict.
    """

    name: str
    about: str
    seconds: int
    command: Callable[[Place], list[str]]
    read: Callable[[Place, str, int], tuple[str, str, Any]]
    reason: Callable[[Place], str | None] = lambda place: None


# ---------------------------------------------------------------------------------------------------------------------
# Two kinds of steps: tests, and measurements


def suite(name: str, about: str, seconds: int, *arguments: str, dry: tuple[str, ...] | None = None) -> Step:
    """Tests of the kernels, by pytest, whose workers also compile side by side. dry: in their place in a dry run."""

    def command(place: Place) -> list[str]:
        chosen = dry if place.dry and dry is not None else arguments
        report = f"--junit-xml={place.file(f'{name}.xml')}"
        return [*python("pytest"), "-q", "-p", "no:cacheprovider", "-n", str(place.workers), report, *chosen]

    def read(place: Place, output: str, status: int) -> tuple[str, str, Any]:
        report = place.file(f"{name}.xml")
        if not report.is_file():
            return FAILED, last_line(output), None
        outcomes = {"passed": [], "failed": [], "skipped": []}
        for case in ElementTree.parse(report).iter("testcase"):
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            kind = "failed" if problem is not None else "skipped" if case.find("skipped") is not None else "passed"
            message = "" if problem is None else problem.get("message", "").replace("\n", " | ")[:1500]
            outcomes[kind].append({"test": case.get("name"), "message": message})
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in outcomes.items() if found)
        failures = [f"\n    {each['test']}: {each['message'][:300]}" for each in outcomes["failed"]]
        good = status == 0 and outcomes["passed"]
        return PASSED if good else FAILED, (counts or last_line(output)) + "".join(failures), outcomes

    return Step(name=name, about=about, seconds=seconds, command=command, read=read)


def measurement(name: str, about: str, seconds: int) -> Step:
    """A part of benchmarks/device_speed.py."""

    def command(place: Place) -> list[str]:
        tiny = ["--tiny"] if place.dry else []
        return [*python("libmoe_fast.benchmarks.device_speed"), name, "--json", str(place.file(f"{name}.json")), *tiny]

    def read(place: Place, output: str, status: int) -> tuple[str, str, Any]:
        file = place.file(f"{name}.json")
        if status != 0 or not file.is_file():
            return FAILED, last_line(output), None
        return PASSED, "\n    ".join(["", *output.strip().splitlines()]), json.loads(file.read_text())

    return Step(name=name, about=about, seconds=seconds, command=command, read=read)


def profile() -> Step:
    """Kernels of the experts under Nsight Compute, at the clocks that the GPU chooses."""

    def command(place: Place) -> list[str]:
        sections = [part for name in ("SpeedOfLight", "Occupancy", "LaunchStats") for part in ("--section", name)]
        kernels = ["--kernel-name", "regex:^(up|down|back|dz|weight_grad)_kernel", "--launch-count", "12"]
        profiled = [*python("libmoe_fast.benchmarks.device_speed"), "once"]
        return ["ncu", "--clock-control", "none", *kernels, *sections, *profiled]

    def read(place: Place, output: str, status: int) -> tuple[str, str, Any]:
        lines = [line.strip() for line in output.splitlines()]
        wanted = [line for line in lines if "_kernel" in line or line.startswith(METRICS)]
        return (PASSED if status == 0 and wanted else FAILED), "\n    ".join(["", *wanted]) or last_line(output), wanted

    def reason(place: Place) -> str | None:
        if place.dry:
            return "there is no GPU to profile"
        return None if shutil.which("ncu") else "ncu, of the CUDA toolkit, is not on PATH"

    about = "five kernels under Nsight Compute"
    return Step(name="ncu", about=about, seconds=60, command=command, read=read, reason=reason)


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def last_line(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


TILES = "tests/kernels/test_tiles.py"
# What the tiles' tests do not show already, and of inductor one router. In a dry run one test of each kind: the others
# are the interpreter's own suite.
ON_DEVICE = "not test_experts_at_real_sizes and not (inductor and (cosine or sigmoid or hyper))"
STEPS = (
    measurement("ceilings", "what the GPU does at most", 40),
    suite(
        "correct",
        "every tile in 16 bits: beside float64, in memory full of NaN, 20 equal runs",
        150,
        *(TILES, "-k", "not float32"),
        dry=(TILES, "-k", "decoding and bfloat16"),
    ),
    suite(
        "float32",
        "the same in float32: in full precision, in tf32, as three tf32 products",
        120,
        *(TILES, "-k", "float32"),
        dry=(TILES, "-k", "decoding and ieee"),
    ),
    suite(
        "device",
        "CUDA graphs, no synchronisation, beyond 2^31, inductor, routing at real sizes",
        120,
        *("tests/kernels/test_gpu.py", "-k", ON_DEVICE),
        dry=("tests/kernels/test_fake_tensors.py",),
    ),
    measurement("tiles", "each tile beside cuBLAS", 150),
    measurement("tiles32", "the same in float32", 60),
    measurement("passes", "kernels that are bound by memory, beside copies", 60),
    measurement("layers", "layers beside their peers and the limit, eager and as a CUDA graph", 100),
    profile(),
)


# ---------------------------------------------------------------------------------------------------------------------
# Running them


@dataclass(kw_only=True)
class Report:
    """What is written after every step."""

    place: Place
    machine: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        print(line_of(verdict), flush=True)
        content = {"machine": self.machine, "steps": [asdict(each) for each in self.verdicts]}
        (self.place.out / "results.json").write_text(json.dumps(content, indent=1))
        (self.place.out / "summary.md").write_text(self.markdown())

    def markdown(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        lines = [
            f"Measured by `make gpu`: {about}.",
            "",
            "| step | verdict | seconds | compiled | |",
            "|---|---|---|---|---|",
        ]
        for each in self.verdicts:
            first = each.summary.partition("\n")[0]
            lines.append(f"| {each.step} | {each.status} | {each.seconds:.0f} | {each.compiled} | {first} |")
        for each in self.verdicts:
            if isinstance(each.data, list) and each.data and isinstance(each.data[0], dict):
                lines += ["", *markdown_table(each.data)]
        return "\n".join(lines) + "\n"


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    head = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return head + [f"| {' | '.join(map(cell, row.values()))} |" for row in rows]


def line_of(verdict: Verdict) -> str:
    compiled = f"  ({verdict.compiled} kernels compiled)" if verdict.compiled else ""
    return f"{verdict.status:8} {verdict.step:9} {verdict.seconds:5.0f} s{compiled}  {verdict.summary}"


def machine(dry: bool) -> dict[str, Any]:
    """What a reader must know to believe the numbers."""
    versions = {name: installed_version(name) or "missing" for name in PACKAGES}
    if dry:
        return {"device": "Triton's interpreter", **versions}
    properties = torch.cuda.get_device_properties(0)
    about = {"device": properties.name, "processors": properties.multi_processor_count, "CUDA": torch.version.cuda}
    return about | versions


def run_step(step: Step, place: Place, seconds_left: float) -> Verdict:
    if (reason := step.reason(place)) is not None:
        return Verdict(step=step.name, status=LEFT_OUT, summary=reason)
    limit = min(step.seconds, seconds_left)
    if limit < 1:
        return Verdict(step=step.name, status=LEFT_OUT, summary="no time was left")
    start, before = time.monotonic(), compiled_kernels(place.cache)
    log = place.file(f"{step.name}.log")
    with log.open("w") as out:
        process = subprocess.Popen(
            step.command(place),
            cwd=ROOT,
            env=place.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            status = None
            process.wait()
    seconds, output = time.monotonic() - start, log.read_text(errors="replace")
    compiled = len(compiled_kernels(place.cache) - before)
    with (place.out / "log.txt").open("a") as out:
        out.write(f"\n=== {step.name}: {step.about}\n{output}")
    if status is None:
        summary = f"stopped after {limit:.0f} s; its last line: {last_line(output)}"
        return Verdict(step=step.name, status=FAILED, summary=summary, seconds=seconds, compiled=compiled)
    found, summary, data = step.read(place, output, status)
    return Verdict(step=step.name, status=found, summary=summary, seconds=seconds, compiled=compiled, data=data)


def check(place: Place, steps: list[Step], limit: float) -> list[Verdict]:
    """Runs the steps, whatever becomes of them; what there is no time for is left out."""
    shutil.rmtree(place.out / ".work", ignore_errors=True)
    place.file("").mkdir(parents=True)
    (place.out / "log.txt").unlink(missing_ok=True)
    report = Report(place=place, machine=machine(place.dry))
    print(", ".join(f"{name} {value}" for name, value in report.machine.items()), flush=True)
    print(f"{len(settle(place.cache))} kernels were compiled before, in {place.cache}", flush=True)
    end = time.monotonic() + limit
    for step in steps:
        report.add(run_step(step, place, end - time.monotonic()))
    shutil.rmtree(place.out / ".work")
    return report.verdicts


def most_workers() -> int:
    """As many test processes as there are cores, up to 8, and as the GPU's memory holds."""
    fit = torch.cuda.mem_get_info()[1] // WORKER_BYTES if torch.cuda.is_available() else 8
    return max(1, min(8, os.cpu_count() or 1, fit))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m libmoe_fast.kernels.device_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="steps:\n" + "\n".join(f"  {step.name:9} {step.about} (at most {step.seconds} s)" for step in STEPS),
    )
    names = [step.name for step in STEPS]
    default = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    parser.add_argument("--out", type=Path, default=default, help="folder of the results (OUT, else runs/gpu)")
    parser.add_argument("--cache", type=Path, default=FOLDER, help="compiled kernels (runs/gpu-cache)")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME", help="which (all)")
    parser.add_argument("--limit", type=float, default=540, help="seconds for all of it (540)")
    workers = most_workers()
    parser.add_argument("--workers", type=int, default=workers, help=f"test processes that share the GPU ({workers})")
    parser.add_argument("--dry-run", action="store_true", help="in Triton's interpreter, at tiny sizes")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --dry-run goes through the same steps in Triton's interpreter")
    if not (ROOT / "tests" / "kernels").is_dir():
        parser.error("the tests of the kernels are not installed with the package: run this in a checkout")
    out, cache = options.out.absolute(), options.cache.absolute()
    place = Place(out=out, cache=cache, dry=options.dry_run, workers=options.workers)
    verdicts = check(place, [step for step in STEPS if step.name in options.steps], options.limit)
    failed = [verdict.step for verdict in verdicts if verdict.status == FAILED]
    print("\nIn short:")
    for verdict in verdicts:
        print(f"  {verdict.status:8} {verdict.step:9} {verdict.summary.strip().partition(chr(10))[0][:150]}")
    print(f"\n{len(failed)} of {len(verdicts)} steps failed; results.json, summary.md and log.txt are in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
