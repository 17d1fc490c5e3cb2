"""One wheel for every torch: builds it against the oldest torch it is for, and tests that same file under that one and
under the torch here.

    .venv/bin/python tests/abi/check.py

The builder's environment, environments/floor.lock, is .abi-venv beside .venv; it is made on the first run and reused.
Everything else happens in a temporary folder, so the checkout is left as it is and is not what gets tested. Prints one
line per check; exit status 0 means that all of them hold.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "environments" / "floor.lock"
NOT_SOURCES = (".*", "runs", "build", "dist", "__pycache__", "*.egg-info", "*.so")
HAS_CUDA = "import torch; print(torch.version.cuda is not None)"
SHOW_CUDA = "from libmoe_fast import extension as e; state = e.load_cuda(); print('loaded' if state.loaded else state)"


class CheckError(Exception):
    """A check that does not hold, with what was seen."""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="libmoe_fast-abi-") as folder:
        try:
            check(Path(folder))
        except CheckError as error:
            print(f"FAIL  {error}", flush=True)
            return 1
    return 0


def check(work: Path) -> None:
    builder = builder_python()
    source = build_sdist(builder, work)
    wheel = build_wheel(builder, source, work / "wheel", LIBMOE_FAST_BUILD="1")
    check_wheel(wheel, work / "wheel")
    check_symbols(wheel, work / "symbols")
    for python in (builder, Path(sys.executable)):
        check_under(python, wheel, work)
    check_without_compiler(builder, source, work)


def passed(message: str) -> None:
    print(f"ok    {message}", flush=True)


def run(*command, cwd: Path | None = None, fails: bool = False, **environment: str) -> str:
    """The command's output, both streams. CheckError if it fails, or with `fails` if it does not."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if (done.returncode != 0) != fails:
        raise CheckError(f"exit status {done.returncode} of: {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def torch_version(python: Path) -> str:
    return run(python, "-c", "import torch; print(torch.__version__)").strip()


def builder_python() -> Path:
    """Python of the environment that builds: torch of the ABI's floor and little else."""
    folder = ROOT / ".abi-venv"
    python = folder / "bin" / "python"
    if not (folder / "bin" / "pip").exists():
        venv.create(folder, with_pip=True)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", LOCK, PIP_CONSTRAINT=str(LOCK))
    locked = re.search(r"^torch==(\S+)", LOCK.read_text(), re.MULTILINE)[1]
    if torch_version(python).partition("+")[0] != locked:
        raise CheckError(f".abi-venv has torch {torch_version(python)}, expected {locked}; delete the folder")
    return python


def build_sdist(builder: Path, work: Path) -> Path:
    """Builds the sdist from a copy of the checkout and unpacks it: the wheel is built from what users download."""
    checkout = work / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(builder, "-c", hook, work, cwd=checkout)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "sdist", filter="data")
    (source,) = (work / "sdist").iterdir()
    sources = (path for path in (ROOT / "csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    needed = [path.relative_to(ROOT) for path in sources]
    needed += [Path(name) for name in ("LICENSE", "pyproject.toml", "setup.py", "tests/test_extension.py")]
    missing = [str(path) for path in needed if not (source / path).is_file()]
    if missing:
        raise CheckError(f"{archive.name} lacks {', '.join(missing)}")
    passed(f"sdist {archive.name} has all {len(list((source / 'csrc').iterdir()))} files of csrc/")
    return source


def build_wheel(builder: Path, source: Path, folder: Path, **environment: str) -> Path:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    path = f"{builder.parent}{os.pathsep}{os.environ['PATH']}"
    run(builder, "-m", "pip", "wheel", *options, source, PATH=path, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(wheel: Path, folder: Path) -> None:
    if not re.search(r"-cp310-abi3-\w+\.whl$", wheel.name):
        raise CheckError(f"expected a wheel tagged cp310-abi3, got {wheel.name}")
    names = zipfile.ZipFile(wheel).namelist()
    needed = ["libmoe_fast/_cpu.abi3.so", "libmoe_fast/__init__.py", "libmoe_fast/train/__init__.py"]
    needed += [f"libmoe_fast/{path.relative_to(ROOT)}" for path in (ROOT / "train" / "presets").rglob("*.yaml")]
    missing = [name for name in needed if name not in names]
    strays = [name for name in names if not re.match(r"libmoe_fast[/-]", name)]
    if missing or strays:
        raise CheckError(f"{wheel.name} lacks {missing} and has top-level {strays}")
    passed(f"wheel {wheel.name} ({wheel.stat().st_size // 1024} KiB)")


def check_symbols(wheel: Path, folder: Path) -> None:
    """Of torch the libraries may need only the C functions of the stable ABI, no C++ symbol."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(name, folder) for name in archive.namelist() if name.endswith(".so")]
    for library in libraries:  # the CUDA part is there only where a CUDA toolkit is
        name = Path(library).name
        undefined = run("nm", "--dynamic", "--undefined-only", library)
        unstable = re.findall(r"\b_Z\w*?(?:2at|3c10|5torch)\w*", undefined)
        stable = re.findall(r"\b(?:aoti_)?torch_\w+", undefined)
        if unstable or not stable:
            raise CheckError(f"{name} needs C++ symbols of torch: {unstable}")
        passed(f"{name} needs {len(stable)} C functions of torch's stable ABI and no C++ symbol of torch")


def check_under(python: Path, wheel: Path, work: Path) -> None:
    """Installs the wheel into a folder of its own and runs the extension's tests on it."""
    version = torch_version(python)
    place = work / f"torch-{version}"
    target = place / "installed"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    shutil.copy(ROOT / "tests" / "test_extension.py", place)
    show_path = "from libmoe_fast import extension; print(extension.load().path)"
    loaded = run(python, "-c", show_path, cwd=place, PYTHONPATH=str(target)).strip()
    if Path(loaded).parent != target / "libmoe_fast":
        raise CheckError(f"under torch {version}, {loaded} was loaded instead of the wheel's library")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_extension.py")
    tests = run(*pytest, cwd=place, PYTHONPATH=str(target))
    passed(f"torch {version}: the wheel's own library, {tests.strip().splitlines()[-1]}")
    if any(target.glob("libmoe_fast/_cuda*.so")) and run(python, "-c", HAS_CUDA).strip() == "True":
        seen = run(python, "-c", SHOW_CUDA, cwd=place, PYTHONPATH=str(target)).strip()
        if seen != "loaded":
            raise CheckError(f"under torch {version} the CUDA part does not load: {seen}")
        passed(f"torch {version}: the wheel's own CUDA part loads")


def check_without_compiler(builder: Path, source: Path, work: Path) -> None:
    """No compiler: one message and a pure-Python wheel; an error where the extension is demanded."""
    wheel = build_wheel(builder, source, work / "pure", CXX="no-such-compiler", LIBMOE_FAST_BUILD="")
    if not wheel.name.endswith("-py3-none-any.whl"):
        raise CheckError(f"expected a pure-Python wheel without a compiler, got {wheel.name}")
    build = (builder, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", work / "none", source)
    for choice, fails in (("", False), ("1", True)):
        shown = run(*build, "-v", fails=fails, CXX="no-such-compiler", LIBMOE_FAST_BUILD=choice)
        if shown.count("no C++ compiler found (no-such-compiler)") != 1 or "Traceback" in shown:
            raise CheckError(f"expected one message about the compiler, got\n{shown}")
    passed(f"without a compiler: one message and {wheel.name}; an error with LIBMOE_FAST_BUILD=1")


if __name__ == "__main__":
    sys.exit(main())
