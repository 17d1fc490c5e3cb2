"""The early warning: the newest versions that our ranges admit, and whether the tests pass with them.

    .tools/bin/python environments/latest.py [gpu] [--only-list]        make latest

1. Holds the lock against pyproject.toml's ranges and against what is known to be bad.
2. Resolves the ranges anew, and lists what moved since the lock.
3. Sets up the result in .latest, apart from .venv, and runs `make test` and `make gate` there.

Exit status 0: the lock is sound, and both pass with the newest versions; `make lock` may move it there.
"""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping

from lock import ENVIRONMENTS, ROOT, Environment, read_lock, resolve
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = ROOT / ".latest"


def admitted(environment: Environment) -> Iterator[Requirement]:
    """The requirements of pyproject.toml that hold in an environment, and those of its .in file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in environment.extras for line in extras[extra])]
    lines += (ROOT / "environments" / f"{environment.name}.in").read_text().splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        requirement = Requirement(line)
        if requirement.name == project["name"]:  # libmoe_fast[train,eval,..]
            yield from (Requirement(r) for extra in requirement.extras for r in extras[extra])
        elif requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def faults(environment: Environment, locked: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with a lock: entries that the ranges do not admit, and what is known to be bad."""
    for requirement in admitted(environment):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"{requirement.name} is required and not locked: make lock LOCK_ARGS=--keep"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is locked at {version}, but the ranges admit {requirement.specifier}: make lock"
    yield from map(str, load_compatibility().problems(locked))


def load_compatibility():
    """libmoe_fast/compatibility.py alone: the package around it needs torch, which is not installed here."""
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "libmoe_fast" / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(package, locked, newest) of each that differs."""
    return [
        (name, before.get(name, "-"), after.get(name, "-"))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def table(rows: list[tuple[str, str, str]]) -> str:
    return "\n".join(
        ["| package | locked | newest |", "|---|---|---|", *(f"| {name} | {old} | {new} |" for name, old, new in rows)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", nargs="?", choices=ENVIRONMENTS, default="gpu")
    parser.add_argument("--only-list", action="store_true", help="install and test nothing")
    options = parser.parse_args()
    environment = ENVIRONMENTS[options.environment]
    locked = read_lock(environment.lock)
    wrong = list(faults(environment, locked))
    for fault in wrong:
        print(f"{environment.lock.name}: {fault}")

    FOLDER.mkdir(exist_ok=True)
    newest_lock = FOLDER / environment.lock.name
    resolve(environment, newest_lock)
    rows = moved(locked, read_lock(newest_lock))
    print(f"{len(rows)} of {len(locked)} packages moved since the lock" + (f":\n\n{table(rows)}\n" if rows else "."))
    if options.only_list:
        return 1 if wrong else 0

    make = ["make", "--no-print-directory", f"VENV={FOLDER / environment.name}", f"LOCK={newest_lock}"]
    make += ["CPU=1"] if environment.name == "cpu" else []
    failed = [f"make {target}" for target in ("test", "gate") if subprocess.run([*make, target], cwd=ROOT).returncode]
    print(f"\n{environment.name}, newest versions: {' and '.join(failed) + ' FAILED' if failed else 'all pass'}.")
    if failed and rows:
        print(f"Moved since the lock:\n\n{table(rows)}")
    if rows and not failed and not wrong:
        print("To move the lock there: make lock")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
