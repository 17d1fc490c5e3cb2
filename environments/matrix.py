"""The version matrix: the layers, upcycling, checkpoints, ops and kernels, on old and new versions of what they need.

    .tools/bin/python environments/matrix.py [NAME ...] [--fresh]        make matrix

Each row has an environment of its own in .matrix, where setup.py builds the package as for a user there, C++ extension
included where that torch can have it. The tests run on that build, not on the checkout. Prints a table, and writes it
to .matrix/table.md. Exit status 0: no test failed. Environments and results are kept: a run that was interrupted goes
on, and what passed with the same sources and tests is not run again; --fresh makes all of it anew.
A row whose Python is not on this machine is reported as not run.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lock import ROOT, UV

FOLDER = ROOT / ".matrix"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment. packages: what is asked for by version; their own requirements follow."""

    name: str
    python: str
    packages: tuple[str, ...]


# numpy: Triton's interpreter before 3.8 cannot read what numpy 2.4 gives it (libmoe_fast/compatibility.py).
ROWS = (
    Row(name="2.9", python="3.10", packages=("torch==2.9.*", "transformers==4.51.*", "numpy<2.4")),
    Row(name="2.11", python="3.12", packages=("torch==2.11.*", "transformers==4.57.*", "numpy<2.4")),
    Row(name="2.13", python="3.11", packages=("torch==2.13.*", "transformers==5.7.*", "numpy<2.4")),
    Row(name="newest", python="3.13", packages=("torch", "transformers", "numpy")),
    Row(name="newest-3.14", python="3.14", packages=("torch", "transformers", "numpy")),
)
# What every row has beside those: what the tests import. accelerate is absent on purpose from the oldest one, below.
NEEDS = (
    "setuptools>=77",
    "ninja",
    "packaging",
    "safetensors",
    "pillow",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
)
OPTIONAL = ("accelerate",)
WITHOUT_OPTIONAL = ("2.9",)  # so that one row shows that it is optional

# Column -> test files.
COLUMNS = {
    "layers": ("test_layer", "test_routers", "test_losses"),
    "upcycle, checkpoint": ("test_upcycle", "test_checkpoint", "test_huggingface"),
    "ops, CPU engine": ("test_ops", "test_extension", "test_cpu_engine", "test_cpu_routing"),
    "launches, races": ("test_launches", "test_race"),
}
KERNELS = "kernels (interpreter)"

SHOW_VERSIONS = """\
import json, platform
import importlib.metadata as m
from libmoe_fast import extension
state = extension.load()
versions = {name: m.version(name) for name in ("torch", "triton", "transformers", "numpy")}
built = f"built with {state.built_with}" if state.loaded else state.reason
print(json.dumps({"Python": platform.python_version(), **versions, "extension": built}))"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows", nargs="*", metavar="NAME", help=f"of {', '.join(row.name for row in ROWS)}; default: all"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="make the environments anew, with the newest patch versions"
    )
    options = parser.parse_args()
    if unknown := set(options.rows) - {row.name for row in ROWS}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; choose of {', '.join(row.name for row in ROWS)}")
    results = [run(row, fresh=options.fresh) for row in ROWS if not options.rows or row.name in options.rows]
    shown = table(results)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "table.md").write_text(shown + "\n")
    print(f"\n{shown}")
    return 1 if any("failed" in cell or "error" in cell for result in results for cell in result.values()) else 0


def run(row: Row, *, fresh: bool) -> dict[str, str]:
    """Column -> what is to be seen there."""
    print(f"\n=== {row.name}: Python {row.python}, {', '.join(row.packages)}", flush=True)
    python = find_python(row.python)
    if python is None:
        return {"Python": row.python, "extension": "not run: this Python is not installed here"}
    folder = FOLDER / row.name
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    venv = folder / "venv"
    if not (folder / "complete").is_file():
        uv("venv", "--quiet", "--clear", "--python", python, venv)
        optional = () if row.name in WITHOUT_OPTIONAL else OPTIONAL
        uv("pip", "install", "--quiet", "--python", venv / "bin" / "python", *row.packages, *NEEDS, *optional)
        (folder / "complete").touch()
    package = build(folder, venv)
    environment = {
        **os.environ,
        "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(package),
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    shown = subprocess.run(
        [venv / "bin" / "python", "-c", SHOW_VERSIONS], cwd=package, env=environment, capture_output=True, text=True
    )
    if shown.returncode != 0:
        print(shown.stderr)
        return {"Python": row.python, "extension": f"error: {shown.stderr.strip().splitlines()[-1]}"}
    result = json.loads(shown.stdout)
    passed = Passed(folder / "passed.json", package, result)
    for column, files in COLUMNS.items():
        tests = [f"tests/{name}.py" for name in files]
        result[column] = passed.before(column, tests) or passed.now(column, test(venv, package, environment, *tests))
    environment["TRITON_INTERPRET"] = "1"
    kernels = [str(path.relative_to(package)) for path in sorted(package.glob("tests/kernels/test_*.py"))]
    result[KERNELS] = passed.before(KERNELS, kernels) or passed.now(KERNELS, test(venv, package, environment, *kernels))
    return result


class Passed:
    """What passed before in a row, with the same sources, tests and versions: column -> (fingerprint, the count)."""

    def __init__(self, file: Path, package: Path, versions: dict[str, str]) -> None:
        self.file, self.package, self.versions = file, package, json.dumps(versions)
        self.known = json.loads(file.read_text()) if file.is_file() else {}
        self.fingerprint = ""

    def before(self, column: str, tests: list[str]) -> str | None:
        others = {f"tests/{name}.py" for names in COLUMNS.values() for name in names} - set(tests)
        digest = hashlib.sha256(self.versions.encode())
        for path in [*sorted(self.package.rglob("*.py")), *sorted((ROOT / "csrc").rglob("*.[ch]*"))]:
            name = str(path.relative_to(self.package if path.is_relative_to(self.package) else ROOT))
            if name not in others:
                digest.update(name.encode() + path.read_bytes())
        self.fingerprint = digest.hexdigest()
        fingerprint, count = self.known.get(column, ("", ""))
        if fingerprint != self.fingerprint:
            return None
        print(f"{column}: {count}, before", flush=True)
        return count

    def now(self, column: str, count: str) -> str:
        if "failed" not in count and "error" not in count:
            self.known[column] = (self.fingerprint, count)
            self.file.write_text(json.dumps(self.known, indent=1))
        return count


def find_python(version: str) -> str | None:
    """A Python of this version on this machine: one on PATH, not that of some virtual environment."""
    command = [str(UV), "python", "find", "--system", "--no-python-downloads", version]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def uv(*arguments: str | Path) -> None:
    subprocess.run([str(UV), *map(str, arguments)], check=True)


def build(folder: Path, venv: Path) -> Path:
    """The package, built by setup.py with the torch in `venv`, and the tests beside it; returns their folder."""
    package = folder / "package"
    shutil.rmtree(package, ignore_errors=True)
    environment = {**os.environ, "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}", "LIBMOE_FAST_CUDA": "0"}
    log = folder / "build.log"
    with log.open("w") as output:
        command = [venv / "bin" / "python", "setup.py", "-q", "build", "-b", folder / "build", "--build-lib", package]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        sys.exit(f"{log.read_text()[-3000:]}\nthe build with {venv} failed; all of it is in {log}")
    shutil.copytree(ROOT / "tests", package / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", package)
    return package


def test(venv: Path, package: Path, environment: dict[str, str], *files: str) -> str:
    """pytest's own count, "212 passed, 3 skipped"; failures are shown as they are."""
    command = [venv / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    done = subprocess.run([*command, *files], cwd=package, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stdout[-20000:], done.stderr[-2000:], flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.strip().splitlines()[-1])
    seen = ", ".join(counts) or f"error: pytest exited with {done.returncode}"
    print(f"{' '.join(files)}: {seen}", flush=True)
    return seen


def table(results: list[dict[str, str]]) -> str:
    columns = ["torch", "triton", "Python", "transformers", "numpy", "extension", *COLUMNS, KERNELS]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(result.get(column, '-') for column in columns)} |" for result in results]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
