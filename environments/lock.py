"""Locks the environments: every package that they hold, direct or not, at one version.

    .tools/bin/python environments/lock.py            make lock: the newest versions that the ranges admit
    .tools/bin/python environments/lock.py --keep     after a change of pyproject.toml: as few changes as possible
    .venv/bin/python environments/lock.py --check gpu the environment that this runs in holds what gpu.lock says

uv resolves pyproject.toml's extras and environments/*.in, for Python 3.10 and newer in one file: where a newest version
needs a newer Python, the file has a line for each. The files are pip's; environments/install.py installs them.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = "3.10"
UV = Path(sys.executable).with_name("uv")  # where .tools runs this


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What one environment holds. name: also that of its .in and .lock files."""

    name: str
    extras: tuple[str, ...]
    config: str | None = None  # a file for uv

    @property
    def lock(self) -> Path:
        return ROOT / "environments" / f"{self.name}.lock"


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(name="gpu", extras=("all",)),
        Environment(name="cpu", extras=("train", "report", "bench", "test"), config="cpu.toml"),
        Environment(name="floor", extras=()),
    )
}


def resolve(environment: Environment, output: Path, *, keep: bool = False) -> None:
    """Writes the newest versions that the ranges admit to `output`; with `keep` those in it stay where they can."""
    config = () if environment.config is None else ("--config-file", f"environments/{environment.config}")
    subprocess.run(
        [
            str(UV), *config, "pip", "compile", "--quiet",
            "--universal", "--python-version", OLDEST_PYTHON, "--no-python-downloads", "--prerelease", "disallow",
            "--no-emit-index-url", "--custom-compile-command", "make lock",
            *(() if keep else ("--upgrade",)),
            *(f"--extra={extra}" for extra in environment.extras),
            "pyproject.toml", f"environments/{environment.name}.in", "--output-file", str(output),
        ],
        cwd=ROOT,
        check=True,
    )  # fmt: skip


def read_lock(path: Path) -> dict[str, str]:
    """Package -> version, for the Python that this runs in."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(r.name): next(iter(r.specifier)).version
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }


def installed() -> dict[str, str]:
    """Package -> version of what is installed here, but for this package. A build's own suffix (+cpu) is left out."""
    found = {
        canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0] for d in importlib.metadata.distributions()
    }
    found.pop("libmoe-fast", None)
    return found


def differences(here: dict[str, str], locked: dict[str, str]) -> Iterator[str]:
    for name in sorted(here.keys() | locked.keys()):
        if here.get(name) != locked.get(name):
            yield f"{name}: {here.get(name, 'not')} installed, {locked.get(name, 'not')} locked"


def check(environment: Environment) -> int:
    """Exit status 0 where the environment that this runs in holds exactly what is locked."""
    locked = read_lock(environment.lock)
    found = list(differences(installed(), locked))
    print("\n".join(found) or f"{len(locked)} packages installed, each as in {environment.lock.relative_to(ROOT)}")
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--keep", action="store_true", help="move only the versions that have to move")
    choice.add_argument("--check", choices=ENVIRONMENTS, help="compare the environment that this runs in with its lock")
    options = parser.parse_args()
    if options.check:
        return check(ENVIRONMENTS[options.check])
    for environment in ENVIRONMENTS.values():
        before = read_lock(environment.lock) if environment.lock.is_file() else {}
        resolve(environment, environment.lock, keep=options.keep)
        after = read_lock(environment.lock)
        moved = sum(before.get(name) != after.get(name) for name in before.keys() | after.keys())
        print(f"{environment.lock.relative_to(ROOT)}: {len(after)} packages here, {moved} moved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
