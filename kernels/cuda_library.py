"""What the CUDA kernels of csrc/cuda/ compiled to, read from the built library."""

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
THREADS = 256  # of a block, in every kernel: kThreads in csrc/cuda/block.cuh
MAX_EXPERTS = 1024

_MANGLED = re.compile(r"_ZN11libmoe_fast4cuda\d+(?P<name>[a-z_]+?)(?:I(?P<dtype>\w+?)Li(?P<width>\d+)E)?E")
_DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "d": "fp64"}


@dataclass(frozen=True, kw_only=True)
class KernelUsage:
    """One kernel on one architecture. shared: bytes per block, for MAX_EXPERTS. spilled: bytes, counted as in aot."""

    name: str
    variant: str  # of a row kernel: its dtype and the elements it loads at once, "bf16 x8"
    registers: int
    spilled: int
    shared: int


def read(library: Path, arch: str) -> list[KernelUsage]:
    """The kernels that `library` (_cuda.abi3.so) has for `arch`, e.g. "sm90"; none if it was not built for that."""
    code = f"sm_{arch.removeprefix('sm')}"
    if code not in call("cuobjdump", "-lelf", library):
        return []
    usage = call("cuobjdump", "-res-usage", "-arch", code, library)
    assembly = dict(_functions(call("cuobjdump", "-sass", "-arch", code, library)))
    shared_bytes = ctypes.CDLL(str(library)).libmoe_fast_shared_bytes
    shared_bytes.restype, shared_bytes.argtypes = ctypes.c_int64, (ctypes.c_char_p, ctypes.c_int64)
    kernels = []
    for mangled, registers, static in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage):
        match = _MANGLED.match(mangled)
        dynamic = shared_bytes(match["name"].encode(), MAX_EXPERTS)
        kernels.append(
            KernelUsage(
                name=match["name"],
                variant=f"{_DTYPES[match['dtype']]} x{match['width']}" if match["dtype"] else "",
                registers=int(registers),
                spilled=4 * len(re.findall(r"\bSTL\b|\bLDL\b", assembly[mangled])),
                shared=int(static) + dynamic,
            )
        )
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.variant))


def call(tool: str, *arguments: str | Path) -> str:
    """Output of one of the CUDA binary tools that triton ships."""
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _functions(assembly: str) -> list[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\S+)$", assembly, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))
