"""Sets up a virtual environment from a lock file, step by step. `make demo`, `make test` and the others call it first.

    python3 environments/install.py gpu [--venv .venv] [--lock environments/gpu.lock]

A step that is done is skipped until what it was made from changes, so an interrupted set-up goes on where it stopped,
and one that is complete takes no time. A step that fails says which it was, why if that can be told, and what to do.

Needs nothing but the Python that will run the environment.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ("gpu", "cpu")

# What pip says -> what that means and what to do; the first that matches.
CAUSES = (
    (r"No space left on device|Disk quota exceeded", "the disk is full: free some space"),
    (
        r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Read timed out|Network is unreachable|"
        r"Connection (?:refused|reset|aborted|broken)|IncompleteRead|ProxyError",
        "the package index could not be reached, or the connection broke: check the network and pip's index and proxy",
    ),
    (
        r"No matching distribution found for (\S+)",
        "the package index does not have {0} for this Python and processor; where it has been withdrawn, `make lock` "
        "chooses a version anew",
    ),
)

NO_CPU_TORCH = """\
the package index gave a torch with CUDA, and the small environment needs one built for CPUs. Name an index of CPU
wheels (PyTorch's installation page lists one) in PIP_EXTRA_INDEX_URL, or leave out CPU=1"""

SHOW_EXTENSION = """\
from libmoe_fast.extension import load
state = load()
print("C++ extension:", "built" if state.loaded else f"{state.reason}; {state.hint}")"""


class SetupError(Exception):
    """A step that did not work, in one line that says why and what to do."""


@dataclass(frozen=True)
class Step:
    """name: what the step sets up. made_from: whatever makes it necessary again when it changes."""

    name: str
    made_from: str
    do: Callable[[], None]


class Setup:
    """The steps for one environment in one folder."""

    def __init__(self, environment: str, venv: Path, lock: Path) -> None:
        self.environment, self.venv, self.lock = environment, venv, lock
        self.python = venv / "bin" / "python"
        self.stamps = venv / ".setup"
        self.kind = f"{environment}, Python {sys.version_info[0]}.{sys.version_info[1]}"

    def steps(self) -> list[Step]:
        locked = self.lock.read_text()
        sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").rglob("*"))]
        package = "".join(
            f"{p.relative_to(ROOT)}\n{p.read_text()}" for p in sources if p.suffix != ".pyc" and p.is_file()
        )
        choices = [os.environ.get(name, "") for name in ("LIBMOE_FAST_BUILD", "LIBMOE_FAST_CUDA", "CXX", "CUDA_HOME")]
        return [
            Step("virtual environment", self.kind, self.make_venv),
            Step("build tools", locked, self.install_tools),
            Step("torch", locked, self.install_torch),
            Step("all other packages", locked, self.install_packages),
            Step("libmoe_fast and its C++ extension", package + str(choices), self.install_package),
        ]

    def run(self) -> None:
        self.refuse_another_environment()
        steps = self.steps()
        done = ""
        for number, step in enumerate(steps, 1):
            done = hashlib.sha256((done + step.made_from).encode()).hexdigest()  # of this step and all before it
            stamp = self.stamps / str(number)
            if stamp.is_file() and stamp.read_text() == done:
                continue
            print(f"set-up {number}/{len(steps)}: {step.name}", flush=True)
            try:
                step.do()
                self.stamps.mkdir(parents=True, exist_ok=True)
                stamp.write_text(done)
            except (SetupError, OSError) as error:
                raise SetupError(f"step {number} of {len(steps)} ({step.name}) failed: {error}.") from error
            except KeyboardInterrupt:
                raise SetupError(f"interrupted in step {number} of {len(steps)} ({step.name}).") from None

    def refuse_another_environment(self) -> None:
        """The folder may hold an environment of another kind or Python, complete or not."""
        file = self.venv / ".kind"
        there = file.read_text() if file.is_file() else self.kind
        if there != self.kind:
            raise SetupError(
                f"{self.venv.name} is an environment `{there}`, and this command asks for `{self.kind}`: ask for the "
                "same (CPU=1, PYTHON=...), or start afresh with make distclean."
            )

    # ------------------------------------------------------------------------------------------------------------------
    # The steps

    def make_venv(self) -> None:
        if not (self.venv / "bin" / "pip").exists():
            self.call(sys.executable, "-m", "venv", self.venv)
        (self.venv / ".kind").write_text(self.kind)

    def install_tools(self) -> None:
        if subprocess.run([self.python, "-m", "pip", "--version"], capture_output=True).returncode != 0:
            self.call(self.python, "-m", "ensurepip")  # an upgrade of pip was interrupted
        self.pip("pip", "setuptools", "wheel", "ninja")

    def install_torch(self) -> None:
        """Before all others: deepspeed and this package are built against the torch that is there."""
        if self.environment == "gpu":
            self.pip("torch", "torchvision")
            return
        # What torch needs follows with all other packages: the index may only know what a torch with CUDA needs.
        self.pip("--no-deps", "torch")
        (version,) = self.python.parent.parent.glob("lib/python*/site-packages/torch/version.py")
        if not re.search(r"^cuda.*= None", version.read_text(), re.MULTILINE):
            raise SetupError(NO_CPU_TORCH)

    def install_packages(self) -> None:
        self.pip("--no-deps", "--no-build-isolation", "--requirement", self.lock)

    def install_package(self) -> None:
        self.pip("--no-deps", "--no-build-isolation", "--editable", ROOT)
        subprocess.run([self.python, "-c", SHOW_EXTENSION], cwd=self.venv)

    # ------------------------------------------------------------------------------------------------------------------

    def pip(self, *arguments: str | Path) -> None:
        """pip install, at the lock's versions. Python compiles what it imports, not the other nine tenths."""
        quiet = () if sys.stdout.isatty() else ("--quiet",)  # progress bars, for somebody who watches
        self.call(self.python, "-m", "pip", "install", "--no-compile", *quiet, *arguments)

    def call(self, *command: str | Path) -> None:
        """Runs a command, shows what it prints, and tells from that why it failed."""
        path = os.pathsep.join((str(self.python.parent), os.environ.get("PATH", "")))  # ninja is there
        # The lock is complete: constraints for other installations on this machine have no say.
        environment = {
            **os.environ,
            "PATH": path,
            "PIP_CONSTRAINT": str(self.lock),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        if sys.stdout.isatty():
            streams = {"stderr": subprocess.PIPE}  # progress bars go straight to the terminal
        else:
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=environment, text=True, **streams)
        said = []
        for line in process.stderr or process.stdout or ():
            sys.stderr.write(line)
            said.append(line)
        if process.wait() != 0:
            raise SetupError(cause("".join(said)) or f"{Path(str(command[0])).name} exited with {process.returncode}")


def cause(output: str) -> str | None:
    """What went wrong according to pip's messages, and what to do."""
    for pattern, meaning in CAUSES:
        if match := re.search(pattern, output):
            return meaning.format(*match.groups())
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environment", choices=ENVIRONMENTS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="its folder (default: .venv)")
    parser.add_argument("--lock", type=Path, help="default: environments/ENVIRONMENT.lock")
    options = parser.parse_args()
    lock = options.lock or ROOT / "environments" / f"{options.environment}.lock"
    try:
        Setup(options.environment, options.venv.absolute(), lock.absolute()).run()
    except SetupError as error:
        print(f"set-up: {error} Run the same command again, and it goes on from there.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
