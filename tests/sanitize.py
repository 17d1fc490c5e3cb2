"""The op tests on the CPU library under address and undefined-behaviour sanitizer.

    .venv/bin/python tests/sanitize.py [pytest's arguments; without files: the tests that run the ops]

Builds the package into a temporary folder, by setup.py with a compiler that adds the sanitizers, and runs a copy of the
tests there, so that the checkout is neither changed nor what gets tested. Fresh memory holds NaN: a value that is read
before it is written shows in the results. Exit status 0 means that all tests pass and no sanitizer reported anything.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine_tests import ENGINE_ONLY, OPS

ROOT = Path(__file__).resolve().parents[1]
COMPILER = os.environ.get("CXX", "g++")
# After setup.py's own options, and the last one counts.
FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
NO_RUNTIME = """\
no {library} of {compiler} found. The sanitizers need g++ and its runtime libraries (Debian, Ubuntu: apt install g++;
Fedora: dnf install libasan libubsan); CXX names another g++."""


def main() -> int:
    preload = os.pathsep.join((runtime_library("libasan.so"), runtime_library("libstdc++.so")))
    with tempfile.TemporaryDirectory(prefix="libmoe_fast-sanitize-") as folder:
        work = Path(folder)
        package = work / "package"
        build(work, package)
        shutil.copytree(ROOT / "tests", package / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", package)
        environment = sanitizing_environment(preload, work / "report")
        check_library(package, environment)
        status = run_tests(package, environment)
        reports = sorted(work.glob("report.*"))
        for report in reports:
            print(f"\n{report.read_text(errors='replace')}")
    print(f"{len(reports)} sanitizer report(s), pytest's exit status {status}")
    return 1 if reports else status


def runtime_library(name: str) -> str:
    """A library of the compiler's runtime. Python itself is not sanitized, so they must be loaded before it."""
    command = [*shlex.split(COMPILER), f"-print-file-name={name}"]
    found = shutil.which(command[0]) is not None
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip() if found else ""
    if not os.path.isabs(path):
        sys.exit(NO_RUNTIME.format(compiler=COMPILER, library=name))
    return path


def build(work: Path, package: Path) -> None:
    compiler = work / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" {FLAGS}\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "LIBMOE_FAST_BUILD": "1", "LIBMOE_FAST_CUDA": "0"}
    command = (sys.executable, "setup.py", "-q", "build", "--build-base", work / "build", "--build-lib", package)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}{done.stderr}\nthe build with sanitizers failed")


def sanitizing_environment(preload: str, report: Path) -> dict[str, str]:
    asan = {
        "detect_leaks": 0,  # Python and torch keep memory until the process ends
        "log_path": report,  # pytest captures what is written to stderr
        "print_legend": 0,
        "malloc_fill_byte": 255,  # NaN in every floating dtype
        "max_malloc_fill_size": 1 << 30,
    }
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in asan.items()),
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}",
        "LIBMOE_FAST_CPU_CACHE_MB": "0",  # a block that the library keeps for reuse counts as allocated
    }


def check_library(package: Path, environment: dict[str, str]) -> None:
    """That the tests load this build, and that it has the sanitizers in it."""
    code = "from libmoe_fast import extension; print(extension.load().path)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=package, env=environment, capture_output=True, text=True)
    path = Path(loaded.stdout.strip())
    if path.parent != package / "libmoe_fast":
        sys.exit(f"expected a library in {package}, got {path}\n{loaded.stderr}")
    needed = subprocess.run(["nm", "--dynamic", "--undefined-only", path], capture_output=True, text=True).stdout
    if "__asan_report_load" not in needed or "__ubsan_handle" not in needed:
        sys.exit(f"{path.name} was built without the sanitizers")


def run_tests(package: Path, environment: dict[str, str]) -> int:
    """pytest's exit status. A finding ends the worker that met it: pytest names the test and goes on."""
    arguments = sys.argv[1:]
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments += [*ENGINE_ONLY, *(f"tests/test_{name}.py" for name in OPS)]
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal")
    return subprocess.run([*command, *arguments], cwd=package, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
