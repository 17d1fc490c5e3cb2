"""The GPU compile gate: every kernel, for every architecture, without a GPU.

    python -m libmoe_fast.kernels.aot [--arch sm90] [--shape CLIP-L] [--operands bf16] [--short] [--markdown]

The launches that a layer makes are observed, not run, and each is compiled ahead of time with all its tiles. The table
says what came out: registers, spilled bytes, shared memory, occupancy, tensor-core instructions and TMA loads. Exit
code 1 on any spill, a GEMM without tensor-core instructions (on NVIDIA, float32 in full precision has none), shared
memory over the chip's limit, an operand that is not read through TMA where architecture and rows allow it, or a buffer
that is overwritten while a product reads it (race.py).
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from libmoe_fast import extension

from . import cuda_library
from .experts import FP32_VARIABLE
from .primitives import INTERPRETED
from .race import races
from .run import COMPILER_OPTIONS, Launch, fitted
from .shapes import CORNERS, SHAPES, SPECS, Shape, layer_launches
from .tiles import DESCRIPTORS

KIB = 1024
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Limits of an architecture, from the vendors' programming guides. registers, shared memory: per multiprocessor."""

    target: GPUTarget
    shared_per_block: int
    shared: int
    registers: int = 65536
    threads: int = 2048
    tensor_core: str  # pattern of its instructions in the machine code


CHIPS = {
    "sm80": Chip(
        target=GPUTarget("cuda", 80, 32), shared_per_block=163 * KIB, shared=164 * KIB, tensor_core=r"\bHMMA\b"
    ),
    "sm90": Chip(
        target=GPUTarget("cuda", 90, 32), shared_per_block=227 * KIB, shared=228 * KIB, tensor_core=r"\bHGMMA\b"
    ),
    "sm100": Chip(
        target=GPUTarget("cuda", 100, 32), shared_per_block=227 * KIB, shared=228 * KIB, tensor_core=r"\bUTC\w*MMA\b"
    ),
    "gfx942": Chip(
        target=GPUTarget("hip", "gfx942", 64),
        shared_per_block=64 * KIB,
        shared=64 * KIB,
        registers=131072,
        tensor_core=r"\bv_mfma",
    ),
}


# What a layer computes on: its dtype, and the precision of float32 products.
OPERANDS = {
    "bf16": (torch.bfloat16, ""),
    "fp16": (torch.float16, ""),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
}
# The short gate: each kernel's first tile, in the dtypes and shapes that differ most, all routers in the first dtype.
# Other tiles, fp16, tf32, full precision, SigLIP's sizes and the corners, left out, take longer than the rest of CI.
SHORT = {"bf16": ["CLIP-L", "fine-grained", "no biases"], "tf32x3": ["CLIP-L"]}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One compilation: plain data, so that it can cross to a worker process. source: see `job`."""

    kernel: str
    shape: str
    router: str
    operands: str
    arch: str
    tensor_core: bool  # whether there must be tensor-core instructions
    descriptor: bool
    tile: str
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    options: dict[str, object]
    module: str

    @property
    def compiled(self) -> str:
        """What the compiler sees: jobs that agree in it come to the same."""
        return repr((self.kernel, self.arch, self.signature, self.constants, self.aligned, self.options))


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a compilation came to."""

    job: Job
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    occupancy: float = 0.0
    tensor_core: int = 0
    tma: int = 0
    races: tuple[str, ...] = ()
    error: str = ""

    @property
    def failures(self) -> list[str]:
        if self.error:
            return [self.error]
        limit = CHIPS[self.job.arch].shared_per_block
        found = {
            f"spills {self.spilled} bytes": self.spilled > 0,
            "no tensor-core instruction": self.job.tensor_core and self.tensor_core == 0,
            f"shared memory {self.shared} over {limit}": self.shared > limit,
            "no TMA load": self.job.descriptor and self.tma == 0,
            f"race: {', '.join(self.races)} overwritten while a product reads it": bool(self.races),
        }
        return [failure for failure, failed in found.items() if failed]


def jobs(
    architectures: list[str],
    shapes: list[Shape],
    operands: list[str],
    first_tile: bool,
    routers: Iterable[str] = SPECS,
) -> list[Job]:
    """Every compilation the gate makes, each once: all kernels and tiles, and for the first shape all `routers`."""
    found: dict[str, Job] = {}
    for arch, name, shape in itertools.product(architectures, operands, shapes):
        dtype, precision = OPERANDS[name]
        os.environ[FP32_VARIABLE] = precision
        for router in routers if shape is shapes[0] else ("smoe",):
            label = {"arch": arch, "shape": shape.name, "router": router, "operands": name}
            for launch in layer_launches(shape, arch, router, dtype):
                for each in launch_jobs(launch, first_tile, **label):
                    found.setdefault(each.compiled, each)
    return list(found.values())


def launch_jobs(launch: Launch, first_tile: bool, **label: str) -> Iterator[Job]:
    if launch.gemm is None:
        yield job(launch, {}, {"num_warps": launch.args.get("num_warps", 4)}, tile="", **label)
        return
    for tile in launch.tiles(label["arch"])[: 1 if first_tile else None]:
        sizes = tile.sizes | fitted(launch.args | tile.sizes, launch.gemm)
        yield job(launch, sizes, tile.options, tile=tile.name, **label)


def job(launch: Launch, sizes: dict, options: dict, **label: str) -> Job:
    """A launch as Triton's just-in-time compiler would specialise it: its arguments' types, constants, alignments."""
    args = {k: v for k, v in launch.args.items() if k not in ("num_warps", "num_stages")} | sizes
    constexprs = {p.name for p in launch.kernel.params if p.is_constexpr}
    general = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature, constants, aligned = {}, {}, []
    for name in launch.kernel.arg_names:
        value = args[name]
        if (
            name in constexprs
            or value is None
            or (isinstance(value, int) and value == 1 and not isinstance(value, bool) and name not in general)
        ):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = argument_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in general):
            aligned.append(name)
    return Job(
        kernel=launch.name,
        tensor_core=launch.gemm is not None and not full_precision(launch, label["arch"]),
        descriptor=launch.gemm in DESCRIPTORS and launch.args["DESCRIPTOR"],
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        options=options,
        module=launch.kernel.fn.__module__,
        **label,
    )


def full_precision(launch: Launch, arch: str) -> bool:
    """Whether a GEMM multiplies float32 as it is, for which NVIDIA's tensor cores have no instruction."""
    return launch.itemsize == 4 and launch.args["PRECISION"] == "ieee" and CHIPS[arch].target.backend == "cuda"


TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


def argument_type(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def kernel_of(job: Job):
    return getattr(import_module(job.module), f"{job.kernel}_kernel")


def compile_job(job: Job) -> Row:
    """Compiles one job and reads the machine code. A compiler's failure is a row that says so."""
    kernel = kernel_of(job)
    position = {name: kernel.arg_names.index(name) for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=job.signature,
        constexprs={(position[name],): value for name, value in job.constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in job.aligned},
    )
    chip = CHIPS[job.arch]
    try:
        compiled = triton.compile(source, target=chip.target, options=job.options | COMPILER_OPTIONS)
        read = read_hip if chip.target.backend == "hip" else read_cuda
        return read(job, chip, compiled)
    # Triton's passes raise many kinds of errors; the gate reports them all as what they are.
    except Exception as error:
        return Row(job=job, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:120]}")


def read_cuda(job: Job, chip: Chip, compiled) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    # Spills are stores and loads of local memory; a stack frame that nothing touches costs nothing.
    spilled = 4 * len(re.findall(r"\bST[L]\b|\bLDL\b", code))
    return Row(
        job=job,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        occupancy=occupancy(chip, registers, compiled.metadata.shared, job.options["num_warps"] * 32),
        tensor_core=len(re.findall(chip.tensor_core, code)),
        tma=len(re.findall(r"\bUTMALDG\b", code)),
        races=tuple(races(compiled.asm["ttgir"])),
    )


def read_hip(job: Job, chip: Chip, compiled) -> Row:
    code = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", code)[1])

    registers = metadata("vgpr_count")
    return Row(
        job=job,
        registers=registers,
        spilled=4 * metadata("vgpr_spill_count"),  # scalar registers spill into vector registers, not into memory
        shared=compiled.metadata.shared,
        occupancy=occupancy(chip, registers, compiled.metadata.shared, job.options["num_warps"] * 64),
        tensor_core=len(re.findall(chip.tensor_core, code)),
    )


def run_tool(name: str, *arguments: str) -> str:
    """One of the CUDA binary tools that triton ships."""
    done = subprocess.run([BINARIES / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def occupancy(chip: Chip, registers: int, shared: int, threads: int) -> float:
    """Share of a multiprocessor's threads that can be resident."""
    blocks = min(
        chip.threads // threads,
        chip.registers // max(registers * threads, 1),
        chip.shared // max(shared, 1),
    )
    return blocks * threads / chip.threads


def library_rows(architectures: list[str]) -> list[Row]:
    """The kernels of csrc/cuda/, from the library that was built at install; none where none was."""
    library = extension.load_cuda().path
    if library is None:
        return []
    return [
        Row(
            job=library_job(usage, arch),
            registers=usage.registers,
            spilled=usage.spilled,
            shared=usage.shared,
            occupancy=occupancy(CHIPS[arch], usage.registers, usage.shared, cuda_library.THREADS),
        )
        for arch in architectures
        if CHIPS[arch].target.backend == "cuda"
        for usage in cuda_library.read(Path(library), arch)
    ]


def library_job(usage: cuda_library.KernelUsage, arch: str) -> Job:
    """The row's label; there is nothing left to compile."""
    return Job(
        kernel=f"CUDA {usage.name}",
        shape="",
        router="",
        operands="",
        arch=arch,
        tensor_core=False,
        descriptor=False,
        tile=usage.variant,
        signature={},
        constants={},
        aligned=(),
        options={},
        module="",
    )


COLUMNS = ("kernel", "shape", "router", "operands", "tile", "regs", "spill", "shared", "occup.", "tensor", "TMA", "")


def cells(row: Row) -> tuple[str, ...]:
    job = row.job
    return (
        job.kernel,
        job.shape,
        job.router,
        job.operands,
        job.tile,
        str(row.registers),
        str(row.spilled),
        f"{row.shared / KIB:.0f}K",
        f"{row.occupancy:.0%}",
        str(row.tensor_core) if job.tensor_core else "",
        str(row.tma) if job.descriptor else "",
        "; ".join(row.failures) or "ok",
    )


def print_table(rows: list[Row], markdown: bool) -> None:
    for arch in dict.fromkeys(row.job.arch for row in rows):
        table = [COLUMNS, *(cells(row) for row in rows if row.job.arch == arch)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        bar = " | " if markdown else "  "
        print(f"\n{arch}\n")
        for i, line in enumerate(table):
            text = bar.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print(f"| {text} |" if markdown else text.rstrip())
            if markdown and i == 0:
                print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def print_summary(rows: list[Row]) -> None:
    """A Markdown table kernel x architecture of the first tile of each: what the README shows."""
    archs = list(dict.fromkeys(row.job.arch for row in rows))
    print("| kernel | " + " | ".join(archs) + " |")
    print("|" + "---|" * (len(archs) + 1))
    for kernel in dict.fromkeys(row.job.kernel for row in rows):
        firsts = [next(row for row in rows if (row.job.kernel, row.job.arch) == (kernel, arch)) for arch in archs]
        print(f"| {kernel} | " + " | ".join(map(summary_cell, firsts)) + " |")


def summary_cell(row: Row) -> str:
    if row.error:
        return "fails"
    parts = [f"{row.registers} regs", f"{row.spilled} spilled", f"{row.shared / KIB:.0f}K"]
    if row.job.tensor_core:
        parts.append(f"{row.tensor_core} tensor-core")
    if row.tma:
        parts.append(f"{row.tma} TMA")
    return ", ".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m libmoe_fast.kernels.aot",
        description=__doc__.split("\n\n")[0],
        epilog="Exit code 1 on any spill, race, GEMM without tensor cores, or shared memory over the limit.",
    )
    layers = {shape.name: shape for shape in (*SHAPES, *CORNERS)}
    parser.add_argument("--arch", choices=CHIPS, nargs="+", default=list(CHIPS), help="architectures (all)")
    parser.add_argument("--shape", choices=layers, nargs="+", default=list(layers), help="layers (all)")
    parser.add_argument("--operands", choices=OPERANDS, nargs="+", default=list(OPERANDS), help="dtypes (all)")
    parser.add_argument(
        "--short",
        action="store_true",
        help="only the first tile of each kernel; " + ", ".join(f"{name}: {', '.join(SHORT[name])}" for name in SHORT),
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    form.add_argument("--summary", action="store_true", help="print one Markdown table: the first tile of each kernel")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    from tqdm import tqdm

    short = options.short or options.summary
    asked = SHORT if short else dict.fromkeys(options.operands, options.shape)
    found = []
    for operands, names in asked.items():
        routers = SPECS if not short or not found else ("smoe",)
        found += jobs(options.arch, [layers[name] for name in names], [operands], first_tile=short, routers=routers)
    work = list({each.compiled: each for each in reversed(found)}.values())[::-1]  # once each, in the first one's name
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(tqdm(pool.map(compile_job, work, chunksize=4), total=len(work), desc="Compiling"))
    if options.summary:
        print_summary(rows)  # of the Triton kernels, which are there on every architecture
    rows += library_rows(options.arch)
    if not options.summary:
        print_table(rows, options.markdown)
    if (cuda := extension.load_cuda()).path is None:
        print(f"\nNo CUDA kernels of csrc/cuda/: {cuda.reason}; {cuda.hint}")
    failed = [row for row in rows if row.failures]
    print(f"\n{len(rows) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
