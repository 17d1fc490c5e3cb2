"""Compiles a layer's kernels for a GPU that is not here, so that a borrowed one spends no minute on it.

    python -m libmoe_fast.kernels.cache [--arch sm90] [--shape NAME ...] [--operands bf16 ...]        make gpu-cache

The compilations are the compile gate's (aot.py), through Triton's just-in-time path under a driver that only names the
GPU, into FOLDER: carry it to the GPU's machine, where device_check finds it, and says how many kernels were missing.
Triton's version must be the same there; kernels that were edited since, and PyTorch's own, are compiled as usual.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .aot import CHIPS, OPERANDS, TYPES, Job, jobs, kernel_of
from .primitives import INTERPRETED
from .run import COMPILER_OPTIONS
from .shapes import CHECKED, SHAPES

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "gpu-cache"
VARIABLE = "TRITON_CACHE_DIR"
# What a launch reads; Triton also keeps every stage of a compilation, ten times as much.
NEEDED = (".cubin", ".hsaco", ".json")
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def fill(folder: Path, work: list[Job]) -> Iterable[str]:
    """Compiles every job into the folder; yields what came of each: "" or the compiler's complaint."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(folder)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(compile_job, work, chunksize=4)
    for file in folder.glob("*/*"):
        if file.suffix not in NEEDED:
            file.unlink()


def compile_job(job: Job) -> str:
    triton.runtime.driver.set_active(naming(job))
    args = {name: argument(job, name, kind) for name, kind in job.signature.items()}
    try:
        kernel_of(job).warmup(grid=(1,), **args, **job.options, **COMPILER_OPTIONS)
    # Triton's passes raise many kinds of errors.
    except Exception as error:
        return f"{job.kernel} {job.tile} {job.shape} {job.operands}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def naming(job: Job) -> SimpleNamespace:
    """A driver that has one GPU of the job's architecture, on which nothing can be launched."""
    return SimpleNamespace(
        get_current_target=lambda: CHIPS[job.arch].target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )


def argument(job: Job, name: str, kind: str):
    """A value that Triton specialises as it did the job's: by its type, and whether it is 1 or 16 divides it."""
    if kind == "constexpr":
        return job.constants[name]
    if kind.startswith("*"):
        return MockTensor(DTYPES[kind[1:]])
    if kind.startswith("tensordesc"):
        dtype, _, block = kind.removeprefix("tensordesc<").rstrip(">").partition("[")
        shape = json.loads(f"[{block}")
        base = SimpleNamespace(dtype=DTYPES[dtype], data_ptr=lambda: 0)
        return TensorDescriptor(base, [1024] * len(shape), [1024**i for i in reversed(range(len(shape)))], shape)
    return 0.5 if kind == "fp32" else 32 if name in job.aligned else 33


def settle(folder: Path) -> set[str]:
    """Makes a cache that was carried here usable, since Triton wrote down where it was; returns its kernels."""
    for group in folder.glob("*/__grp__*.json"):
        content = json.loads(group.read_text())
        here = {name: str(group.parent / name) for name in content["child_paths"]}
        if here != content["child_paths"]:
            group.write_text(json.dumps(content | {"child_paths": here}))
    return compiled_kernels(folder)


def compiled_kernels(folder: Path) -> set[str]:
    """The compiled kernels of a cache."""
    return {str(file) for kind in ("cubin", "hsaco") for file in folder.glob(f"*/*.{kind}")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m libmoe_fast.kernels.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = {shape.name: shape for shape in (*SHAPES, *CHECKED)}
    parser.add_argument("--arch", choices=CHIPS, default="sm90", help="architecture (sm90)")
    parser.add_argument("--shape", choices=shapes, nargs="+", default=list(shapes), help="layers (those of make gpu)")
    parser.add_argument("--operands", choices=OPERANDS, nargs="+", default=list(OPERANDS), help="dtypes (all)")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER", help="the cache (runs/gpu-cache)")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    from tqdm import tqdm

    work = jobs([options.arch], [shapes[name] for name in options.shape], options.operands, first_tile=False)
    complaints = list(filter(None, tqdm(fill(options.to, work), total=len(work), desc="Compiling")))
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
    count, size = len(compiled_kernels(options.to)), sum(file.stat().st_size for file in options.to.glob("*/*"))
    print(f"{count} kernels, {size / 2**20:.0f} MiB, by Triton {triton.__version__}: {options.to}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
