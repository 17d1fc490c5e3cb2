"""One run's settings. The docstrings below are the command line's help."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from libmoe_fast.errors import ConfigError
from libmoe_fast.multiscale import check_scales
from libmoe_fast.routers import build_router, check_router_options
from libmoe_fast.targets import check_target

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


@dataclass(kw_only=True)
class RunConfig:
    """Where a run lives and how often it writes.

    Args:
        folder: the run's folder; the same command on the same folder goes on from its last checkpoint
        seed: seeds the new weights, the data order and the training noise
        save_every: optimizer steps between two checkpoints
        keep_checkpoints: how many checkpoints to keep while training
        delete_checkpoints_when_done: remove them once final/ is written (nothing is left to resume)
        export_at: shares of the steps after which weights are also written to exports/, without optimizer state, to be
            evaluated; [0.1, 0.2, 0.3] = after 10, 20 and 30% (the last ones are final/ in any case)
        patience: stop when the loss on data.held_out has not fallen at so many exports in a row; none given = never
        log_every: optimizer steps between two writes of log.jsonl; every step gets its line all the same
        tensorboard: also write TensorBoard events
    """

    folder: str = ""
    seed: int = 0
    save_every: int = 500
    keep_checkpoints: int = 2
    delete_checkpoints_when_done: bool = True
    export_at: list[float] = field(default_factory=list)
    patience: int | None = None
    log_every: int = 10
    tensorboard: bool = True


@dataclass(kw_only=True)
class ModelConfig:
    """What is trained: a LLaVA checkpoint (path), or one composed of a vision tower and a language model.

    Args:
        stage: 1 trains the projector, 2 trains everything, 3 upcycles a dense checkpoint and trains everything
        path: a LLaVA folder: final/ of an earlier stage, or one in Hugging Face's own format
        vision_tower: folder of a CLIP or SigLIP model, for a new LLaVA (instead of path)
        language_model: folder of a causal language model, for a new LLaVA (instead of path)
        vision_feature_layer: which hidden state of the vision tower the projector reads (new LLaVA only)
        scales: sizes at which the vision tower looks at an image, as multiples of its own; [1, 3] is LibMoE's S2, ten
            passes of the tower; none given = what the checkpoint at path was trained with, else [1]
        chat_template: the chat format the language model was trained with; none given = what the checkpoint at path
            was trained with, else phi3
        router: name of a router (stage 3)
        num_experts: experts per layer, N (stage 3)
        top_k: experts each token visits, K (stage 3)
        targets: which dense MLPs become experts (stage 3): vision, projector, language, patterns of module names, or
            a part of one, as in vision[-4:]
        router_options: the router's own options by name, as in {"temperature": 0.5} (stage 3)
        balance_coef: weight of the balance loss (stage 3)
        z_coef: weight of the z-loss (stage 3)
        backend: engine that runs the experts; none given = the best one here
    """

    stage: int = 1
    path: str | None = None
    vision_tower: str | None = None
    language_model: str | None = None
    vision_feature_layer: int = -2
    scales: list[int] | None = None
    chat_template: Literal["phi3", "phi3.5"] | None = None
    router: str = "smoe"
    num_experts: int = 4
    top_k: int = 2
    targets: list[str] = field(default_factory=lambda: ["vision", "projector"])
    router_options: dict[str, Any] = field(default_factory=dict)
    balance_coef: float = 0.01
    z_coef: float = 0.001
    backend: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """What it is trained on.

    Args:
        file: LLaVA JSON: a list of {id, image (absent = text only), conversations: [{from: human|gpt, value}]}
        images: folder that the records' image paths start from; none given = the folder of file
        held_out: LLaVA JSON whose loss is measured at each export (run.export_at) and at the end, into held_out.jsonl;
            its images start from images, or from its own folder
        fraction: train on this share of the records, drawn at random; 0.5 of LLaVA-665K is LibMoE's 332K
        fraction_seed: draws them, whatever run.seed is, so that runs with several seeds train on the same records
        max_length: longer samples are cut to this many tokens, image tokens included
        image_aspect: "pad" makes images square with the processor's mean colour; "none" leaves it to the processor;
            none given = what the checkpoint at model.path was trained with, else pad
        skip_bad_samples: leave out samples that cannot be used, count and list them, instead of stopping at the first
        megabatch: global batches that are sorted by length together; more means less padding and less mixing
        workers: processes that load images, per training process; 0 = none
    """

    file: str = ""
    images: str | None = None
    held_out: str | None = None
    fraction: float = 1.0
    fraction_seed: int = 0
    max_length: int = 2048
    image_aspect: Literal["pad", "none"] | None = None
    skip_bad_samples: bool = False
    megabatch: int = 1
    workers: int = 2


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a cosine schedule.

    Args:
        lr: highest learning rate
        batch_size: samples per process and forward pass
        accumulation: forward passes per optimizer step
        epochs: passes over the data
        max_steps: stop (and end the schedule) after so many optimizer steps; none given = epochs decides
        warmup_ratio: share of the steps over which the learning rate rises
        weight_decay: AdamW's weight decay
        betas: AdamW's betas
        max_grad_norm: clips the gradient's norm; 0 = no clipping
    """

    lr: float = 1e-3
    batch_size: int = 8
    accumulation: int = 1
    epochs: int = 1
    max_steps: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0


@dataclass(kw_only=True)
class EngineConfig:
    """How DeepSpeed runs it.

    Args:
        dtype: arithmetic of the model; optimizer state is fp32 under bf16 and fp16
        zero_stage: what is sharded: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters
        offload: keep optimizer state (and, at stage 3, parameters) in CPU memory
        checkpointing: recompute activations in backward instead of keeping them
        expert_parallel: how many processes share one copy of the experts, each holding its part of every layer's; 1 =
            each holds all. ZeRO stage 2, in stage 3 of the training
        tf32: allow TF32 in fp32 matrix products on GPUs that have it
        deepspeed: further DeepSpeed settings, merged over the ones made from these options
    """

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    zero_stage: int = 2
    offload: bool = False
    checkpointing: Literal["non_reentrant", "reentrant", "off"] = "non_reentrant"
    expert_parallel: int = 1
    tf32: bool = True
    deepspeed: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainConfig:
    """One stage of training.

    Args:
        run: where it lives
        model: what is trained
        data: what it is trained on
        optim: optimizer and schedule
        engine: how DeepSpeed runs it
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


# A resumed run may change these: none of them changes what is computed.
HARMLESS = {
    "run.save_every",
    "run.keep_checkpoints",
    "run.delete_checkpoints_when_done",
    "run.export_at",
    "run.patience",
    "run.log_every",
    "run.tensorboard",
    "data.held_out",
    "data.workers",
}


# And these: they change what is read from here on only. A run that a bad sample has stopped goes on without it.
FROM_HERE_ON = {"data.skip_bad_samples": True}  # option -> the value that it may change to

LARGEST = 10**9
BELOW_ONE = math.nextafter(1.0, 0.0)
RANGES = {  # option -> smallest and largest value
    "run.seed": (0, 2**32 - 1),  # what NumPy takes
    "run.save_every": (1, LARGEST),
    "run.keep_checkpoints": (1, LARGEST),
    "run.patience": (1, LARGEST),
    "run.log_every": (1, LARGEST),
    "data.fraction": (0, 1),
    "data.fraction_seed": (0, 2**32 - 1),
    "data.max_length": (1, LARGEST),
    "data.megabatch": (1, LARGEST),
    "data.workers": (0, 1024),
    "optim.lr": (0, LARGEST),
    "optim.batch_size": (1, LARGEST),
    "optim.accumulation": (1, LARGEST),
    "optim.epochs": (1, LARGEST),
    "optim.max_steps": (1, LARGEST),
    "optim.warmup_ratio": (0, 1),
    "optim.weight_decay": (0, LARGEST),
    "optim.max_grad_norm": (0, LARGEST),
    "each of optim.betas": (0, BELOW_ONE),
    "engine.zero_stage": (0, 3),
    "engine.expert_parallel": (1, LARGEST),
    "model.balance_coef": (0, LARGEST),
    "model.z_coef": (0, LARGEST),
}


def _range(low: float, high: float) -> str:
    if high == LARGEST:
        return f"at least {low} (and no more than {LARGEST:,})"
    return f"at least {low} and below 1" if high == BELOW_ONE else f"from {low} to {high}"


def check(config: TrainConfig) -> None:
    """Refuses settings that cannot work, before anything slow is loaded.

    Raises:
        ConfigError: with what was given and what was expected.
    """
    _require(bool(config.run.folder), "run.folder is not set; give the run a folder, as in --run.folder runs/stage1")
    _require(bool(config.data.file), "data.file is not set; name the LLaVA JSON file, as in --data.file train.json")
    check_values(config)
    _require(
        config.engine.dtype != "fp16" or torch.cuda.is_available(),
        "engine.dtype is fp16, but there is no GPU here; choose bf16 or fp32",
    )
    model = config.model
    parts = model.vision_tower is not None and model.language_model is not None
    _require(
        (model.path is not None) != parts and (parts or not (model.vision_tower or model.language_model)),
        "name either model.path (a LLaVA folder), or both model.vision_tower and model.language_model",
    )


def check_values(config: TrainConfig) -> None:
    """The part of `check` that asks for no file and no GPU; raises the same."""
    furthest = max(config.optim.betas, key=lambda beta: abs(beta - 0.5))
    options = flatten(plain(config)) | {"each of optim.betas": furthest}
    for name, (low, high) in RANGES.items():
        value = options[name]
        fits = value is None or low <= value <= high  # NaN never does
        _require(fits, f"{name} is {value}; it must be {_range(low, high)}")
    _require(config.data.fraction > 0, "data.fraction is 0; it must be above 0, and at most 1")
    _require(config.optim.lr > 0, f"optim.lr is {config.optim.lr}; it must be positive")
    _require(
        not config.engine.offload or config.engine.zero_stage > 0, "engine.offload needs engine.zero_stage 1, 2 or 3"
    )
    _check_expert_parallel(config)
    for share in config.run.export_at:
        _require(0 < share <= 1, f"run.export_at has {share}; its shares of the steps must be above 0, and at most 1")
    _require(
        config.run.patience is None or (bool(config.run.export_at) and config.data.held_out is not None),
        "run.patience needs data.held_out, whose loss it waits for, and run.export_at, which says when to look",
    )
    _check_deepspeed(config.engine.deepspeed)
    _check_model(config.model)


def _check_expert_parallel(config: TrainConfig) -> None:
    engine, model = config.engine, config.model
    if engine.expert_parallel == 1:
        return
    given = f"engine.expert_parallel is {engine.expert_parallel}"
    _require(engine.zero_stage == 2, f"{given}, which needs engine.zero_stage 2; it is {engine.zero_stage}")
    _require(model.stage == 3, f"{given}, but there are no experts in stage {model.stage}; leave it out")
    _require(
        model.num_experts % engine.expert_parallel == 0,
        f"{given}, which does not divide the {model.num_experts} experts of a layer (model.num_experts)",
    )


# DeepSpeed's own names of what our options say; dots as levels.
OURS = {
    "train_micro_batch_size_per_gpu": "optim.batch_size",
    "train_batch_size": "optim.batch_size and optim.accumulation",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.lr and optim.warmup_ratio",
    "bf16.enabled": "engine.dtype",
    "fp16.enabled": "engine.dtype",
    "zero_optimization.stage": "engine.zero_stage",
}


def _check_deepspeed(settings: dict[str, Any]) -> None:
    """One setting has one place: a second one would contradict it sooner or later."""
    for name, option in OURS.items():
        level: Any = settings
        for key in name.split("."):
            level = level.get(key) if isinstance(level, dict) else None
        _require(level is None, f"engine.deepspeed sets {name}; set {option} instead")


def _check_model(model: ModelConfig) -> None:
    _require(model.stage in (1, 2, 3), f"model.stage is {model.stage}; choose 1, 2 or 3")
    if model.scales is not None:
        check_scales(model.scales)
    if model.stage == 3:
        _check_moe(model)


def _check_moe(model: ModelConfig) -> None:
    _require(bool(model.targets), "model.targets is empty; choose from vision, projector and language")
    for target in model.targets:
        check_target(target)
    # Building a small router on the meta device lets each router check its own options, and costs nothing.
    check_router_options(model.router, model.router_options)
    build_router(model.router, 16, model.num_experts, model.top_k, device="meta", **model.router_options)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def plain(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Sections of options in types that YAML knows, as `--config` reads them."""
    sections = dataclasses.asdict(config)
    sections["optim"]["betas"] = list(config.optim.betas)
    return sections


def flatten(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"run": {"folder": ...}} as {"run.folder": ...}."""
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def add_train_arguments(parser: "ArgumentParser") -> None:
    """Adds --config, the options of TrainConfig (--model.router ...) and --skip-bad-samples."""
    parser.add_argument(
        "--config", action="config", help="YAML file of options; several are merged in the order they are given"
    )
    parser.add_class_arguments(TrainConfig)
    parser.add_argument("--skip-bad-samples", action="store_true", help="short for --data.skip_bad_samples true")
    # DeepSpeed's launcher appends this to every command; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the deepspeed launcher")


def config_from_namespace(namespace: "Namespace") -> TrainConfig:
    """The TrainConfig that a parser made by add_train_arguments has read."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{name: section(**vars(namespace[name])) for name, section in sections.items()})
    if namespace.skip_bad_samples:
        config.data.skip_bad_samples = True
    return config
