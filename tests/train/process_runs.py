"""Started by test_processes.py with torchrun: runs on two processes, one after the other in the same pair.

torchrun --nproc_per_node 2 process_runs.py FOLDER MODEL IMAGES MIXED HELD_OUT
"""

import os
import signal
import sys
from pathlib import Path

from tiny_runs import make_config

from libmoe_fast.train import loop

# Biases that no optimizer has, moved at each step; a float32 checkpoint with a frozen part beside it.
OTHER_PROCESSES = {"model__router": "shared_v3", "model__router_options": {"bias_rate": 0.01}}


def main(folder: Path, model: Path, images: Path, mixed: Path, held_out: Path) -> None:
    shared = {"optim__batch_size": 2, "optim__accumulation": 2}  # x 2 processes = 8
    loop.train(make_config(folder / "zero2", model, images, **shared, engine__zero_stage=2))
    zero3 = {**shared, "engine__zero_stage": 3, "engine__checkpointing": "non_reentrant"}
    zero3 |= {"data__held_out": str(held_out), "run__export_at": [0.4]}
    loop.train(make_config(folder / "zero3", model, images, **zero3))

    stopped = make_config(folder / "stopped", model, images, **zero3)
    stop_after_first_step(stopped, rank="1")
    loop.train(stopped)

    # Begun here and ended on one process, and the other way round.
    for stage in (1, 2, 3):
        begun = {**shared, **OTHER_PROCESSES, "engine__zero_stage": stage}
        stop_after_first_step(make_config(folder / f"two_to_one_{stage}", model, images, **begun), rank="1")
        loop.train(make_config(folder / f"one_to_two_{stage}", model, images, **begun))

    # One process has an image, the other a text, in the batch that collects what is left.
    options = {"optim__batch_size": 1, "optim__max_steps": None, "model__balance_coef": 0.0, "model__z_coef": 0.0}
    loop.train(make_config(folder / "mixed", model, mixed, **options, engine__zero_stage=3))


def stop_after_first_step(config, *, rank: str) -> None:
    """One of the processes alone is told to stop, in its first step; all save it."""
    original = loop.learning_rate

    def interrupting(step, **options):
        if step == 0 and os.environ.get("RANK", rank) == rank:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, **options)

    loop.learning_rate = interrupting
    try:
        loop.train(config)
    except KeyboardInterrupt:
        return
    finally:
        loop.learning_rate = original
    raise AssertionError("the run was not stopped")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
