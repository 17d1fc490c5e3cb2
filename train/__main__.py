"""`libmoe-fast train` as a module, for launchers: `torchrun -m libmoe_fast.train ...`, `deepspeed --module ...`."""

import sys

from libmoe_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
