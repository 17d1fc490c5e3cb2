"""Finds a CUDA toolkit that can compile this folder. For setup.py; needs neither torch nor a GPU."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# sm80 also runs on sm86 and sm89. The newest one comes as PTX too, which the driver compiles for later GPUs.
ARCHITECTURES = (80, 90, 100)

PROBE = """\
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void probe(__nv_bfloat16* out) { out[threadIdx.x] = __float2bfloat16_rn(1.0f); }
"""


class ToolkitError(Exception):
    """Why there is no usable toolkit, in one line."""


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """A toolkit that has compiled a small kernel here."""

    home: Path
    version: str
    architectures: tuple[int, ...]
    include_dirs: tuple[str, ...]  # besides its own, which nvcc knows
    library_dir: str  # of libcudart_static.a: with it, the library needs no CUDA library of a certain version

    @property
    def flags(self) -> list[str]:
        """nvcc's choice of architectures."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        newest = self.architectures[-1]
        return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find(pip_packages: Path, cuda_version: str | None) -> Toolkit:
    """The toolkit to build with. Raises ToolkitError.

    pip_packages: the folder `nvidia` of site-packages, where pip puts parts of CUDA. cuda_version: torch's, if any; its
    major version has to be the toolkit's.
    """
    home = find_home(pip_packages)
    version = nvcc_version(home)
    if cuda_version is not None and version.split(".")[0] != cuda_version.split(".")[0]:
        raise ToolkitError(f"the CUDA toolkit {version} in {home} does not fit torch, built for {cuda_version}")
    return Toolkit(
        home=home,
        version=version,
        architectures=known_architectures(home),
        include_dirs=needed_includes(home, tuple(sorted(str(path) for path in pip_packages.glob("*/include")))),
        library_dir=find_library(home, pip_packages),
    )


def find_home(pip_packages: Path) -> Path:
    """The folder that CUDA_HOME or CUDA_PATH name, else that of the nvcc on PATH or in the usual places."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            nvcc = Path(folder) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise ToolkitError(f"{name} is {folder}, but there is no {nvcc}")
            return real_home(nvcc)
    on_path = shutil.which("nvcc")
    usual = [Path("/usr/local/cuda/bin/nvcc"), *sorted(pip_packages.glob("*/bin/nvcc"))]
    for nvcc in (*([Path(on_path)] if on_path else []), *usual):
        if nvcc.is_file():
            return real_home(nvcc)
    raise ToolkitError("no CUDA toolkit was found (nvcc is not on PATH, and CUDA_HOME is not set)")


def real_home(nvcc: Path) -> Path:
    """The toolkit's folder. nvcc may be a link or a script elsewhere that calls the real one; that says where it is."""
    shown = call(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", shown, re.MULTILINE)
    if top is None:
        raise ToolkitError(f"{nvcc} does not say where its toolkit is (nvcc --dryrun)")
    return Path(top[1].strip()).resolve()


def nvcc_version(home: Path) -> str:
    shown = call(home / "bin" / "nvcc", "--version")
    release = re.search(r"release (\d+\.\d+)", shown)
    if release is None:
        raise ToolkitError(f"{home}/bin/nvcc does not say its version")
    return release[1]


def known_architectures(home: Path) -> tuple[int, ...]:
    shown = call(home / "bin" / "nvcc", "--list-gpu-code").split()
    known = tuple(a for a in ARCHITECTURES if f"sm_{a}" in shown)
    if not known:
        raise ToolkitError(f"the CUDA toolkit in {home} compiles for none of sm80, sm90 and sm100")
    return known


def needed_includes(home: Path, offered: tuple[str, ...]) -> tuple[str, ...]:
    """The folders of headers that a small kernel needs to compile: none, or those offered. ToolkitError if neither."""
    try:
        compile_probe(home, ())
        return ()
    except ToolkitError:
        if not offered:
            raise
    compile_probe(home, offered)
    return offered


def compile_probe(home: Path, include_dirs: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(prefix="libmoe_fast-nvcc-") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE)
        includes = [f"-I{path}" for path in include_dirs]
        call(home / "bin" / "nvcc", "-std=c++20", *includes, "-c", source, "-o", source.with_suffix(".o"))


def find_library(home: Path, pip_packages: Path) -> str:
    name = "libcudart_static.a"
    for pattern, root in (("lib*", home), ("targets/*/lib", home), ("*/lib", pip_packages)):
        for path in sorted(root.glob(f"{pattern}/{name}")):
            return str(path.parent)
    raise ToolkitError(f"the CUDA toolkit in {home} has no {name}")


def call(*command: str | Path) -> str:
    """The command's output, both streams. ToolkitError if it cannot run or fails."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolkitError(f"{command[0]} does not run: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        wrong = next((line for line in lines if "error" in line), lines[-1])
        raise ToolkitError(f"{command[0]} does not work: {wrong.strip()}")
    return done.stdout
