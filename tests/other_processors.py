"""The suite, on the paths that other processors take through the CPU engine.

    python tests/other_processors.py [--whole] [pytest's arguments]

Without --whole, tests are left out for which no path is another: of files where no layer computes, of the `reference`
backend and of a compiler's graphs (engine_tests.py).

Two variables take instructions away, so one machine shows what others do. A path that this machine takes anyway is left
to `make test`.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from engine_tests import ENGINE_ONLY, NO_LAYERS

HERE = Path(__file__).parent
# A variable and its value -> the capability of torch's that it takes away.
PATHS = {
    ("LIBMOE_FAST_CPU_ISA", "avx2"): "avx512_f",
    ("LIBMOE_FAST_CPU_ISA", "avx512"): "avx512_bf16",
    ("LIBMOE_FAST_CPU_GEMM", "torch"): "avx2",  # the experts' products, as without tiles: in torch.mm
}


def main(arguments: list[str]) -> int:
    has = torch.cpu.get_capabilities()
    whole = "--whole" in arguments
    rest = [argument for argument in arguments if argument != "--whole"]
    left_out = [] if whole else [*(f"--ignore={HERE / name}" for name in NO_LAYERS), *ENGINE_ONLY]
    for (variable, value), taken in PATHS.items():
        path = f"{variable}={value}"
        if not has.get(taken, False):
            print(f"{path}: this processor has no {taken}, and takes that path by itself", flush=True)
            continue
        print(f"{path}: without {taken}", flush=True)
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", str(HERE), *left_out, *rest]
        if code := subprocess.run(command, env={**os.environ, variable: value}).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
