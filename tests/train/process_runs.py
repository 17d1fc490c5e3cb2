"""Started by test_processes.py with torchrun: runs on two processes, one after the other in the same pair.

torchrun --nproc_per_node 2 process_runs.py FOLDER MODEL IMAGES MIXED HELD_OUT
"""

import os
import signal
import sys
from pathlib import Path

from tiny_runs import make_config

from libmoe_fast.train import loop


def main(folder: Path, model: Path, images: Path, mixed: Path, held_out: Path) -> None:
    shared = {"optim__batch_size": 2, "optim__accumulation": 2}  # x 2 processes = 8
    loop.train(make_config(folder / "zero2", model, images, **shared, engine__zero_stage=2))
    zero3 = {**shared, "engine__zero_stage": 3, "engine__checkpointing": "non_reentrant"}
    zero3 |= {"data__held_out": str(held_out), "run__export_at": [0.4]}
    loop.train(make_config(folder / "zero3", model, images, **zero3))

    stopped = make_config(folder / "stopped", model, images, **zero3)
    original = loop.set_training_progress
    loop.set_training_progress = interrupting(original)
    try:
        loop.train(stopped)
    except KeyboardInterrupt:
        loop.set_training_progress = original
        loop.train(stopped)

    # One process has an image, the other a text, in the batch that collects what is left.
    options = {"optim__batch_size": 1, "optim__max_steps": None, "model__balance_coef": 0.0, "model__z_coef": 0.0}
    loop.train(make_config(folder / "mixed", model, mixed, **options, engine__zero_stage=3))


def interrupting(function):
    """One of the processes alone is told to stop, in its first step."""

    def wrapper(model, step, steps):
        if step == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)
        function(model, step, steps)

    return wrapper


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
