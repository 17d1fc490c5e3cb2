"""The CPU engine's tests on the paths that processors with fewer instructions take.

    python tests/other_processors.py [pytest's arguments]

LIBMOE_FAST_CPU_ISA takes instructions away, so one machine shows what others do. A path that this machine takes anyway
is left to `make test`.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = ("cpu_engine", "cpu_routing", "ops", "layer")
# What LIBMOE_FAST_CPU_ISA may say -> the capability of torch's that it takes away.
CAPS = {"avx2": "avx512_f", "avx512": "avx512_bf16"}


def main() -> int:
    has = torch.cpu.get_capabilities()
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in TESTS]
    for isa, taken in CAPS.items():
        if not has.get(taken, False):
            print(f"{isa}: this processor has no {taken}, and takes that path by itself", flush=True)
            continue
        print(f"{isa}: without {taken}", flush=True)
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *files, *sys.argv[1:]]
        if code := subprocess.run(command, env={**os.environ, "LIBMOE_FAST_CPU_ISA": isa}).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
