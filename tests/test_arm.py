"""The engine's tiles on 64-bit ARM, without one: cross-compiled, and run in an emulator; the same program here.

The compiler and the emulator are Debian's g++-aarch64-linux-gnu and qemu-user. The other tests of the engine run on
what this machine has (and `make isa`, without some of it).
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
TILES = [
    Path(__file__).parent / "arm" / "products.cpp",
    *(CSRC / f"{name}.cpp" for name in ("narrow", "packing", "tile_gemm")),
]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
needs_cross = pytest.mark.skipif(
    shutil.which(CROSS) is None, reason=f"needs {CROSS} (apt install g++-aarch64-linux-gnu)"
)

needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on an x86-64 machine"
)


def compiled(compiler: str, sources: list[Path], *options: str) -> None:
    include = Path(torch.__file__).parent / "include"
    folders = [f"-I{folder}" for folder in (CSRC, include, include / "torch" / "csrc" / "api" / "include")]
    flags = ["-std=c++20", "-Wall", "-Werror", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DLIBMOE_FAST_TORCH_VERSION="any"']
    done = subprocess.run(
        [compiler, *flags, *folders, *options, *map(str, sources)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program = tmp_path_factory.mktemp("here") / "products"
    compiled("g++", TILES, "-O2", "-o", str(program))
    return program


@pytest.mark.parametrize("isa", ["", "avx512", "avx2"])
def test_tiles_here(isa, program):
    done = subprocess.run([program], capture_output=True, text=True, env=os.environ | {"LIBMOE_FAST_CPU_ISA": isa})
    assert done.returncode == 0, done.stdout


@needs_cross
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"needs {EMULATOR} (apt install qemu-user)")
def test_tiles_on_arm(tmp_path):
    program = tmp_path / "products"
    compiled(CROSS, TILES, "-O3", "-static", "-o", str(program))
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "right: tiles of up to 12 rows\n")


@pytest.mark.parametrize(
    ("compiler", "multiply", "per_row", "stack"),
    [
        pytest.param("g++", "\tvfmadd", 2, r"\(%r[sb]p\)", id="avx2", marks=needs_x86),
        pytest.param(CROSS, "\tfmla\t", 4, r"\[sp", id="neon", marks=needs_cross),
    ],
)
def test_sums_stay_in_registers(compiler, multiply, per_row, stack, tmp_path):
    """Of the loop over steps for each number of rows: as many multiplications as it needs, and nothing on the stack."""
    listing = tmp_path / "narrow.s"
    compiled(compiler, [CSRC / "narrow.cpp"], "-O3", "-S", "-o", str(listing))
    found = []
    for block in listing.read_text().split("\n.L"):
        loop = re.split(r"\n\t(?:b|j)[a-z.]+\t", block)[0]  # up to the jump that ends it
        if multiplications := loop.count(multiply):
            found.append(multiplications)
            assert not re.search(stack, loop), loop
    assert sorted(found) == [per_row * rows for rows in range(1, 7)]


@needs_cross
def test_the_whole_engine_compiles_for_arm():
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source: compiled(CROSS, [source], "-fsyntax-only"), sorted(CSRC.glob("*.cpp"))))
