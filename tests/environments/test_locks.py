"""The lock files hold what pyproject.toml asks for, in versions that are known to be good together."""

import subprocess
import sys
from pathlib import Path

import latest
import lock
import matrix
import pytest
import torch
from packaging.version import Version

from libmoe_fast import compatibility, extension

ROOT = lock.ROOT


@pytest.mark.parametrize("environment", lock.ENVIRONMENTS.values(), ids=lambda environment: environment.name)
def test_a_lock_is_sound(environment):
    assert list(latest.faults(environment, lock.read_lock(environment.lock))) == []


def test_a_planted_break_is_named():
    """filelock 4 in the lock: what broke `make demo` when there was none."""
    environment = lock.ENVIRONMENTS["gpu"]
    locked = lock.read_lock(environment.lock)
    faults = list(latest.faults(environment, locked | {"filelock": "4.3.1"}))
    assert any("filelock is locked at 4.3.1, but the ranges admit <4" in fault for fault in faults)
    assert any("lmms-eval" in fault and "filelock._api" in fault for fault in faults)
    without = {name: version for name, version in locked.items() if name != "pytest"}
    assert [fault for fault in latest.faults(environment, without) if "pytest is required and not locked" in fault]


def test_a_line_for_each_python(tmp_path):
    """Of a package with several lines, the one whose marker holds here counts; comments do not."""
    major, minor = sys.version_info[:2]
    path = tmp_path / "some.lock"
    path.write_text(
        f"# made by make lock\nSix_Pack==1.0 ; python_version < '{major}.{minor}'\n"
        f"six-pack==2.0 ; python_version >= '{major}.{minor}'\n    # via nothing\nplain==3\n"
    )
    assert lock.read_lock(path) == {"six-pack": "2.0", "plain": "3"}


def test_an_environment_is_held_against_its_lock():
    here, locked = {"a": "1", "b": "2"}, {"b": "3", "c": "4"}
    assert list(lock.differences(here, here)) == []
    assert list(lock.differences(here, locked)) == [
        "a: 1 installed, not locked",
        "b: 2 installed, 3 locked",
        "c: not installed, 4 locked",
    ]


def test_what_moved_is_listed():
    assert latest.moved({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == [("b", "2", "3"), ("c", "-", "4")]


def test_the_matrix_has_the_floors():
    """The oldest torch of the package and of the extension are rows, and tested ranges start at the first."""
    rows = {row.name for row in matrix.ROWS}
    oldest, _ = compatibility.TESTED["torch"]
    assert {oldest, ".".join(map(str, extension.TORCH_FLOOR))} <= rows
    (floor,) = (r for r in latest.admitted(lock.ENVIRONMENTS["gpu"]) if r.name == "torch")
    assert str(floor.specifier) == f">={oldest}"
    names = {name for files in matrix.COLUMNS.values() for name in files}
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in names)


def test_the_newest_tested_versions_are_not_older_than_the_lock():
    locked = lock.read_lock(lock.ENVIRONMENTS["gpu"].lock)
    for name, (_, newest) in compatibility.TESTED.items():
        assert Version(locked[name]).release[: len(Version(newest).release)] <= Version(newest).release, name


def test_the_source_tree_runs_without_being_installed(tmp_path):
    """PYTHONPATH alone finds libmoe_fast.kernels and the other folders beside libmoe_fast/."""
    for folder in ("libmoe_fast", "kernels", "train", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "setup.py").touch()
    code = (
        "import libmoe_fast.kernels.run, libmoe_fast.train.config, libmoe_fast.benchmarks.cases as c\n"
        "import sys; print(libmoe_fast.__file__, c.__file__)\n"
        "assert 'transformers' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    # -S: an editable installation is not seen; torch's folder is named, since it still has to be.
    path = f"{tmp_path}:{Path(torch.__file__).parents[1]}"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env={"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(tmp_path) for file in done.stdout.split())
