"""The C++ extension (csrc/): finding it, loading it, and saying exactly why where it cannot be loaded.

It is a library of torch ops on torch's stable ABI, `_cpu.abi3.so` beside this file, loaded with torch.ops.load_library.
Its CUDA part, `_cuda.abi3.so`, implements the token permutation's ops for CUDA tensors; it is optional.
"""

import functools
import re
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

NAME = "_cpu"
PERMUTATION_OPS = ("permute_index", "gather", "weighted_scatter", "row_dot")
OPS = (*PERMUTATION_OPS, "cpu_dispatch", "cpu_dispatch_backward", "cpu_experts", "cpu_experts_backward")
CUDA_NAME = "_cuda"
CUDA_OPS = PERMUTATION_OPS
TORCH_FLOOR = (2, 11)  # as in setup.py; older ones lack a part of the stable ABI that csrc/ needs

_REBUILD = (
    "rebuild it against the torch that is installed: in a checkout `pip install --no-build-isolation --no-deps -e .`, "
    "else `pip install --no-build-isolation --no-deps --force-reinstall libmoe_fast`"
)
_BUILD = (
    "install g++ 11 or newer (apt install g++) and install libmoe_fast again; with LIBMOE_FAST_BUILD=1 an extension "
    "that cannot be built is an error"
)
_UPGRADE = (
    f'pip install "torch>={".".join(map(str, TORCH_FLOOR))}" and install libmoe_fast again; without it the backends '
    "`reference` and, on a GPU, `triton` do everything"
)
_BUILD_CUDA = (
    "install a CUDA toolkit (nvcc; CUDA_HOME names its folder) and install libmoe_fast again; with LIBMOE_FAST_CUDA=1 "
    "a CUDA part that cannot be built is an error"
)


@dataclass(frozen=True, kw_only=True)
class ExtensionState:
    """Whether the extension is loaded, and if not, why and what to do."""

    loaded: bool
    path: str | None = None  # None: there is no such file
    reason: str | None = None  # None where loaded
    hint: str | None = None
    built_with: str | None = None  # the torch version it was built with, where the file says so


@functools.cache
def load() -> ExtensionState:
    """Loads the extension, once per process. Never raises: whatever went wrong is in the state it returns."""
    path = find(Path(__file__).parent)
    if torch_version() < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        reason = f"the C++ extension needs torch {floor} or newer, and here is {torch.__version__}"
        return ExtensionState(loaded=False, path=path and str(path), reason=reason, hint=_UPGRADE)
    if path is None:
        return ExtensionState(
            loaded=False, reason="the C++ extension was not built when libmoe_fast was installed", hint=_BUILD
        )
    return load_file(path, OPS)


@functools.cache
def load_cuda() -> ExtensionState:
    """Loads the CUDA part, once per process, after the extension that defines the ops. Never raises, as `load`."""
    path = find(Path(__file__).parent, CUDA_NAME)
    if path is None:
        return ExtensionState(
            loaded=False, reason="the CUDA part was not built when libmoe_fast was installed", hint=_BUILD_CUDA
        )
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built without CUDA"
        return ExtensionState(loaded=False, path=str(path), reason=reason, hint="install a torch built with CUDA")
    extension = load()
    if not extension.loaded:
        reason = f"it needs the C++ extension, which is not loaded: {extension.reason}"
        return ExtensionState(loaded=False, path=str(path), reason=reason, hint=extension.hint)
    return load_file(path, CUDA_OPS, "CUDA")


def find(folder: Path, name: str = NAME) -> Path | None:
    """The extension's file in `folder`, or None."""
    candidates = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def load_file(path: Path, ops: tuple[str, ...] = OPS, device: str = "CPU") -> ExtensionState:
    """Loads the library at `path`, which implements `ops` for `device`. Never raises."""
    built_with = None
    try:
        built_with = read_built_with(path)
        torch.ops.load_library(str(path))
        missing = [op for op in ops if not _has_kernel(op, device)]
    except Exception as error:  # a broken library must not break `import libmoe_fast`: its state says what broke
        return ExtensionState(
            loaded=False, path=str(path), reason=_why(path, built_with, error), hint=_REBUILD, built_with=built_with
        )
    if missing:
        reason = f"{path.name} is older than this libmoe_fast: it has no op {', '.join(missing)}"
        return ExtensionState(loaded=False, path=str(path), reason=reason, hint=_REBUILD, built_with=built_with)
    return ExtensionState(loaded=True, path=str(path), built_with=built_with)


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _has_kernel(op: str, device: str) -> bool:
    defined = hasattr(torch.ops.libmoe_fast, op)
    return defined and torch._C._dispatch_has_kernel_for_dispatch_key(f"libmoe_fast::{op}", device)


def read_built_with(path: Path) -> str | None:
    """The torch version written into the library (csrc/ops.cpp), read without loading it; None if there is none."""
    match = re.search(rb"libmoe_fast built with torch ([\w.+-]+)\0", path.read_bytes())
    return match and match.group(1).decode()


def _why(path: Path, built_with: str | None, error: Exception) -> str:
    if built_with is None:
        return f"{path.name} is not a library of libmoe_fast, or it is cut short: {error}"
    return f"{path.name}, built with torch {built_with}, does not load with torch {torch.__version__}: {error}"
