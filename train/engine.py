"""DeepSpeed: starting it, configuring it, and getting whole weights back out of it."""

import atexit
import functools
import logging
import math
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from libmoe_fast.errors import ConfigError, in_one_line
from libmoe_fast.train.config import TrainConfig
from libmoe_fast.train.expert_groups import parameter_groups, share_experts

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_processes() -> None:
    """Joins the launcher's process group, or makes one of this process alone. Sets the GPU."""
    import deepspeed
    import transformers

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        # Gloo does all that training needs; DeepSpeed's shared-memory collectives (for inference) take 30 s to build.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if dist.is_initialized():
        if dist.get_world_size() == 1:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        return
    if not _launched():
        os.environ["LOCAL_RANK"] = "0"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed()
    if dist.get_rank() > 0:
        transformers.utils.logging.disable_progress_bar()  # one bar for loading weights is enough
    atexit.register(_stop_processes)


def _launched() -> bool:
    """Whether a launcher has started this process as one of several, or of one.

    Raises:
        ConfigError: its variables say so in part only.
    """
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    processes = os.environ.get("WORLD_SIZE", "1")
    if missing and processes != "1":
        raise ConfigError(
            f"WORLD_SIZE is {processes!r}, but {', '.join(missing)} is not set; start with torchrun or deepspeed, "
            "which set them all, or unset WORLD_SIZE to train in one process"
        )
    return not missing


def _stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _host_group() -> dist.ProcessGroup:
    # Gloo, whatever the GPUs talk over: bookkeeping of numbers the host knows should not wait for the device.
    return dist.new_group(backend="gloo")


def sum_over_ranks(values: list[int]) -> list[int]:
    """Adds up each value over all ranks. All ranks must call it."""
    sums = torch.tensor(values)
    dist.all_reduce(sums, group=_host_group())
    return sums.tolist()


def collect_from_ranks(lines: list[str]) -> list[str]:
    """The lines of all ranks, in rank order. All ranks must call it."""
    collected: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(collected, lines, group=_host_group())
    return [line for lines in collected for line in lines]


def from_first_rank(value: Any) -> Any:
    """What rank 0 gives, on all ranks. All ranks must call it."""
    values = [value]
    dist.broadcast_object_list(values, group=_host_group())
    return values[0]


def recompute_activations(model: nn.Module, config: TrainConfig) -> None:
    """Switches activation checkpointing on, as engine.checkpointing says."""
    if config.engine.checkpointing == "off":
        return
    reentrant = config.engine.checkpointing == "reentrant"
    with warnings.catch_warnings():  # transformers 5.23 renamed it; 4.57 knows only this name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def make_engine(model: nn.Module, config: TrainConfig, *, universal: bool = False) -> Any:
    """A DeepSpeedEngine around the model, with AdamW on what is trainable.

    universal: the checkpoint that it will load is one of DeepSpeed's universal ones.
    """
    import deepspeed

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.engine.tf32
    recompute_activations(model, config)
    model.train()
    if config.engine.expert_parallel > 1:
        share_experts(model, config.engine.expert_parallel)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        parameter_groups(trainable),
        lr=optim.lr,
        betas=tuple(optim.betas),
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over the state: 8 to 20 times faster on a CPU, where offload keeps it
    )
    try:
        settings = deepspeed_config(config)
        if universal:
            settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
        engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, optimizer=optimizer, config=settings)
    # DeepSpeed checks its settings by assertions, pydantic and errors of its own; what is ours to set is right.
    except Exception as error:
        if not config.engine.deepspeed:
            raise
        raise ConfigError(f"DeepSpeed refuses its settings with engine.deepspeed: {in_one_line(error)}") from error
    return engine


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's settings for ours, with engine.deepspeed merged over them."""
    engine, optim = config.engine, config.optim
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if engine.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    made = {
        "train_micro_batch_size_per_gpu": optim.batch_size,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.dtype == "bf16"},
        "fp16": {"enabled": engine.dtype == "fp16"},
        # torch's AdamW runs everywhere; DeepSpeed's would be compiled first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return _merge(made, engine.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def learning_rate(step: int, *, peak: float, steps: int, warmup_ratio: float) -> float:
    """Rate of optimizer step `step` (0-based): a linear rise, then a half cosine that would reach 0 at `steps`."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def model_inputs(engine: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch's inputs where the model is, pixels in its dtype."""
    moved = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in inputs.items()}
    moved["pixel_values"] = moved["pixel_values"].to(engine.module.dtype)
    return moved


def step_engine(engine: Any) -> Tensor | float | None:
    """Ends a micro-step, which DeepSpeed makes an optimizer step after the last of a global batch.

    Returns: after the last, the gradient's norm before clipping.
    """
    norm = None
    mixed = engine.bfloat16_enabled() or engine.fp16_enabled()
    if engine.is_gradient_accumulation_boundary() and engine.zero_optimization_stage() == 0 and not mixed:
        # Without ZeRO and mixed precision DeepSpeed clips but does not tell the norm.
        norm = nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return norm if norm is not None else engine.get_global_grad_norm()
