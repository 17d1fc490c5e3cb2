"""Going on with another number of processes, through DeepSpeed's universal checkpoints.

ZeRO cuts optimizer state (and, at stage 3, parameters) into as many parts as there are processes. DeepSpeed's converter
puts every parameter's parts together again, and its engine, told so when it is made, cuts them anew.
"""

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from libmoe_fast.errors import CheckpointError, in_one_line


def convert(checkpoint: Path, whole: Path) -> None:
    """Writes what a ZeRO checkpoint holds, uncut, into `whole`, a folder beside it.

    Raises:
        CheckpointError: DeepSpeed's converter cannot read it.
    """
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(whole),
        num_extract_workers=1,  # in this process, which has no GPU memory to hand on to others
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # of pipelines and tensor parallelism, which are not here
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # a page of progress
            ds_to_universal.main(options)
    # Assertions, KeyErrors and torch's own: no common kind.
    except Exception as error:
        raise CheckpointError(
            f"DeepSpeed cannot convert {checkpoint} for another number of processes ({in_one_line(error)}); start as "
            "many as wrote it"
        ) from error
    (checkpoint.parent / "latest_universal").unlink(missing_ok=True)


def load_buffers(module: torch.nn.Module, whole: Path) -> None:
    """What no optimizer has, and DeepSpeed leaves out of a universal checkpoint: selection biases, for one."""
    stored: dict[str, Any] = {}
    for path in sorted(whole.glob("*model_states.pt"))[:1]:  # the same in each
        stored = torch.load(path, map_location="cpu", weights_only=False)["module"]
    state = module.state_dict(keep_vars=True)
    for name, buffer in state.items():
        if not isinstance(buffer, torch.nn.Parameter):
            buffer.copy_(stored[name])
