"""Started by test_kill.py: one run killed at many moments, each in a forked process, beside one left in peace.

    python kill_runs.py FOLDER MODEL DATA

Forking this process, which has imported everything and computed nothing, saves importing it all for each run.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401
import transformers.models.llava.modeling_llava  # noqa: F401
from tiny_runs import make_config

from libmoe_fast.train import loop, state
from libmoe_fast.train.config import TrainConfig


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dying_when(condition: Callable[..., bool], function: Callable) -> Callable:
    """The function, except that the process is killed before the first call that meets the condition."""
    return lambda *args, **options: die() if condition(*args) else function(*args, **options)


def in_a_step() -> None:
    loop.learning_rate = dying_when(lambda step: step == 3, loop.learning_rate)


def with_half_a_checkpoint() -> None:
    state.random_state = die  # DeepSpeed's files are there, ours are not


def with_a_checkpoint_not_flushed() -> None:
    state.publish = die


def before_it_becomes_the_latest() -> None:
    state.write_atomically = dying_when(lambda path, _: path.name == "latest", state.write_atomically)


def while_removing_an_old_one() -> None:
    state.shutil.rmtree = dying_when(lambda path, *_: "removed" in str(path) and path.exists(), state.shutil.rmtree)


def before_the_next_checkpoint() -> None:
    loop.learning_rate = dying_when(lambda step: step == 9, loop.learning_rate)


def in_the_export() -> None:
    state.save_model = die


MOMENTS = [
    in_a_step,
    with_half_a_checkpoint,
    with_a_checkpoint_not_flushed,
    before_it_becomes_the_latest,
    while_removing_an_old_one,
    before_the_next_checkpoint,
    in_the_export,
]


def start(config: TrainConfig, prepare: Callable[[], None] = lambda: None) -> int:
    pid = os.fork()
    if pid == 0:
        prepare()
        loop.train(config)
        os._exit(0)
    return pid


def main(folder: Path, model: Path, data: Path) -> None:
    options = {
        "optim__max_steps": 12,
        "run__save_every": 2,
        "run__keep_checkpoints": 1,
        "model__router": "hyper",  # K rises with the step
        "optim__batch_size": 4,
        "optim__accumulation": 2,
        "data__workers": 1,
    }
    _, code = os.waitpid(start(make_config(folder / "whole", model, data, **options)), 0)
    assert code == 0
    config = make_config(folder / "killed", model, data, **options)
    at_any_moment(config)
    for moment in MOMENTS:
        _, status = os.waitpid(start(config, moment), 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed, f"{moment.__name__}: the run ended with status {status} before that moment"
    _, code = os.waitpid(start(config), 0)
    assert code == 0


def at_any_moment(config: TrainConfig) -> None:
    """Kills from outside, whatever the run is doing just then: once, soon after its first line of log."""
    log = Path(config.run.folder) / "log.jsonl"
    pid = start(config)
    while not (log.exists() and log.read_bytes().count(b"\n")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
