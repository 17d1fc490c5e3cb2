"""What a stage costs, known before it is paid for: its model at true size, run on shapes alone.

    model on the meta device -> parameters, exactly
    forward and backward of one batch there -> operations (torch.utils.flop_counter) and live bytes, step by step

No weight is read and no number computed, so that a laptop plans for eight GPUs in seconds. Attention is counted as the
fused kind that GPUs run. What is assumed, not counted, is said in the plan: utilisation, lengths of texts, and what
DeepSpeed keeps of its own.
"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from libmoe_fast import ops
from libmoe_fast.errors import CheckpointError, ConfigError
from libmoe_fast.fused import tell_flop_counter
from libmoe_fast.multiscale import use_scales
from libmoe_fast.spec import check_not_negative
from libmoe_fast.train.config import TrainConfig, check_values
from libmoe_fast.train.engine import recompute_activations
from libmoe_fast.train.expert_groups import check_groups
from libmoe_fast.train.model import DTYPES, compose_config, image_tokens, prepare_stage
from libmoe_fast.upcycle import moe_layers

GIB = 2**30
LIVE_PARAMETERS = 10**9  # gathered at once: DeepSpeed's stage3_max_live_parameters
BUCKET = 5 * 10**8  # elements of its buffers for reducing and gathering (reduce_bucket_size, allgather_bucket_size)
CONTEXT = 1.0 * GIB  # the CUDA context, NCCL's buffers, kernels
ADAMW_BYTES = 28  # of host memory per parameter and step: 4 tensors of float32 are read and 3 written
GPUS_PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """memory in GiB; flops: the dense bf16 peak of the vendor's data sheet, per second."""

    memory: float
    flops: float


GPUS = {
    "a100-40g": Gpu(memory=40, flops=312e12),
    "a100-80g": Gpu(memory=80, flops=312e12),
    "h100": Gpu(memory=80, flops=989e12),
    "h200": Gpu(memory=141, flops=989e12),
    "b200": Gpu(memory=180, flops=2250e12),
    "l40s": Gpu(memory=48, flops=362e12),
    "rtx4090": Gpu(memory=24, flops=165e12),
}

# Sizes from the models' published config.json.
VISION: dict[str, dict[str, Any]] = {
    "clip-l-336": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu",
    },
    "siglip-so400m-224": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,  # as load_vision_tower leaves it
    },
}  # fmt: skip
_PHI3 = {
    "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
}  # fmt: skip
LANGUAGE: dict[str, dict[str, Any]] = {
    "phi3-mini-4k": _PHI3 | {"max_position_embeddings": 4096},
    "phi3.5-mini": _PHI3 | {"max_position_embeddings": 131072},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What presets are made for. hours: of each stage on 4 A100, from table 3 of LibMoE's paper (stage 3: 332K)."""

    vision: str
    language: str
    scales: tuple[int, ...] = (1, 3)
    hours: tuple[str, str, str]


SETTINGS = {  # by the start of the presets' names
    "clip_phi3_": Setting(vision="clip-l-336", language="phi3-mini-4k", hours=("5.6", "18", "27 to 34")),
    "siglip_phi3_": Setting(vision="siglip-so400m-224", language="phi3-mini-4k", hours=("2.8", "16", "26 to 32")),
    "siglip_phi35_": Setting(vision="siglip-so400m-224", language="phi3.5-mini", hours=("2.9", "17.1", "25 to 33")),
}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A stage's data, as LibMoE's table 1 counts it: samples, and tokens and images of one."""

    samples: int
    text_tokens: float
    images: float


# Table 1 of the paper, over its samples: 558K captions, 708K of ALLaVA, 665K of LLaVA.
CORPORA = {
    1: Corpus(samples=558_128, text_tokens=1.52e7 / 558_128, images=1.0),
    2: Corpus(samples=708_000, text_tokens=1.59e8 / 708_000, images=1.0),
    3: Corpus(samples=665_298, text_tokens=1.54e8 / 665_298, images=3.60e8 / 576 / 665_298),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was counted. Parameters are numbers; bytes and operations are of one batch on one GPU."""

    total: int
    active: int  # that one token meets
    trained: int
    experts: int  # all of all layers
    moe_layers: int
    image_tokens: int
    batch: int
    flops: float  # forward, backward and what is recomputed
    activations: float  # the most bytes alive at once, of what is neither weights nor gradients of weights
    weight_bytes: int  # of one parameter


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a stage costs on `gpus` GPUs. Bytes are of one GPU, but for the host's and the disk's."""

    measured: Measured
    corpus: Corpus
    gpus: int
    gpu: str
    utilisation: float
    steps: int
    offload_seconds: float  # of a step: AdamW on the host, and what travels there and back
    flops: float  # of the whole stage
    memory: dict[str, float]  # part -> bytes
    host: float
    checkpoint: float
    final: float
    notes: list[str] = field(default_factory=list)

    @property
    def offload_hours(self) -> float:
        return self.offload_seconds * self.steps / 3600

    @property
    def hours(self) -> float:
        """Of the GPUs' work alone."""
        return self.flops / (self.gpus * GPUS[self.gpu].flops * self.utilisation) / 3600

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= GPUS[self.gpu].memory * GIB

    def __str__(self) -> str:
        from tabulate import tabulate

        m, corpus, gpu = self.measured, self.corpus, GPUS[self.gpu]
        used, peak = sum(self.memory.values()) / GIB, gpu.flops / 1e12
        rows = {
            "parameters": f"{m.total / 1e9:.3f} B; a token meets {m.active / 1e9:.3f} B, {m.trained / 1e9:.3f} B train",
            "MoE layers": f"{m.moe_layers}",
            "a sample": f"{corpus.images:.2f} images of {m.image_tokens} tokens, {corpus.text_tokens:.0f} of text",
            "optimizer steps": f"{self.steps:,} for {corpus.samples:,} samples",
            "operations": f"{self.flops:.3g}, {m.flops / m.batch / 1e12:.1f} TFLOP per sample",
            "time": f"{self.hours:.1f} h on {self.gpus} x {self.gpu} at {self.utilisation:.0%} of {peak:.0f} TFLOP/s"
            + (f", and {self.offload_hours:.1f} h of offload" if self.offload_seconds else ""),
            "memory of a GPU": f"{used:.1f} GiB of {gpu.memory:g}: it {'fits' if self.fits else 'does NOT fit'}",
            **{f"- {part}": f"{size / GIB:.1f} GiB" for part, size in self.memory.items()},
            "memory of the host": f"{self.host / GIB:.1f} GiB for what is offloaded",
            "disk": f"{self.checkpoint / GIB:.1f} GiB per checkpoint, {self.final / GIB:.1f} GiB for final/",
        }
        table = tabulate(rows.items(), tablefmt="plain", disable_numparse=True)
        return "\n".join([table, "", *self.notes])


def plan(
    config: TrainConfig,
    *,
    gpus: int,
    gpu: str,
    vision: str,
    language: str,
    setting: Setting | None = None,
    samples: int | None = None,
    text_tokens: float | None = None,
    images: float | None = None,
    utilisation: float = 0.4,
    host_bandwidth: float = 100.0,
    link_bandwidth: float = 20.0,
) -> Plan:
    """The cost of the stage that `config` describes.

    Args:
        gpus, gpu: how many GPUs, and which of GPUS.
        vision, language: of VISION and LANGUAGE, or folders with a config.json.
        setting: what a preset is for, which gives the scales where the config does not.
        samples, text_tokens, images: of the data, and of a sample; none given = as in the paper's stage.
        utilisation: the share of the GPUs' peak that is reached.
        host_bandwidth, link_bandwidth: GB/s of a host's memory, and between it and one GPU, each way; for offload.

    Raises:
        ConfigError: an unknown GPU or model, or numbers out of their range.
    """
    if gpu not in GPUS:
        raise ConfigError(f"gpu is {gpu!r}; choose one of {', '.join(GPUS)}")
    if gpus < 1:
        raise ConfigError(f"gpus is {gpus}; it must be at least 1")
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is {utilisation}; it must be above 0 and at most 1")
    check_values(config)
    check_groups(config.engine.expert_parallel, of=gpus)
    for name, value in {"host_bandwidth": host_bandwidth, "link_bandwidth": link_bandwidth}.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}; it must be above 0")
    given = {"samples": samples, "text_tokens": text_tokens, "images": images}
    corpus = replace(CORPORA[config.model.stage], **{name: value for name, value in given.items() if value is not None})
    for name in given:
        check_not_negative(name, getattr(corpus, name))
    corpus = replace(corpus, samples=max(1, round(corpus.samples * config.data.fraction)))
    scales = config.model.scales or (setting.scales if setting else (1,))
    measured = measure(config, vision=vision, language=language, scales=scales, corpus=corpus)
    batch = config.optim.batch_size * config.optim.accumulation * gpus
    steps = math.ceil(corpus.samples / batch) * config.optim.epochs
    if config.optim.max_steps is not None:
        steps = min(steps, config.optim.max_steps)
    memory, host = memory_of(measured, config, gpus)
    return Plan(
        measured=measured,
        corpus=corpus,
        gpus=gpus,
        gpu=gpu,
        utilisation=utilisation,
        steps=steps,
        offload_seconds=offload_seconds(measured, config, gpus, host_bandwidth * 1e9, link_bandwidth * 1e9),
        flops=measured.flops / measured.batch * batch * steps,
        memory=memory,
        host=host,
        checkpoint=held(measured, config) * measured.weight_bytes + measured.trained * state_bytes(config),
        final=measured.total * measured.weight_bytes,
        notes=notes(config, setting),
    )


def setting_of(presets: Sequence[str]) -> Setting | None:
    """What the presets of these names are for."""
    return next((known for name in presets for start, known in SETTINGS.items() if name.startswith(start)), None)


def models_of(config: TrainConfig, setting: Setting | None) -> tuple[str, str]:
    """(vision tower, language model): the folders that the config names, where they are here, or the setting's."""
    model = config.model
    named = (model.vision_tower or model.path or "", model.language_model or model.path or "")
    known = (setting.vision, setting.language) if setting else named
    here = [(Path(folder) / "config.json").exists() for folder in named]
    return (named[0] if here[0] else known[0], named[1] if here[1] else known[1])


def notes(config: TrainConfig, setting: Setting | None) -> list[str]:
    said = [
        "Counted: parameters, operations, activations. Assumed: the share of the peak that is reached; samples of",
        "average length (a batch of long ones takes more); DeepSpeed's own buffers, and 1 GiB of context.",
    ]
    if config.engine.offload:
        said += [
            "Offload: fused AdamW at the speed of the host's memory, its threads enough for that, and every byte on",
            "its way while nothing else happens; both bandwidths are assumed (--host_bandwidth, --link_bandwidth).",
        ]
    if config.engine.expert_parallel > 1:
        said += [
            "Experts shared among GPUs: activations as if all experts had equally many tokens; those that travel are",
            "counted neither in memory nor in time.",
        ]
    if setting is not None:
        said.append(f"LibMoE's paper, table 3: {setting.hours[config.model.stage - 1]} h on 4 A100.")
    return said


def state_bytes(config: TrainConfig) -> int:
    """Of the optimizer, per trained parameter: AdamW's two moments, and float32 weights where the model's are not."""
    return 8 if config.engine.dtype == "fp32" else 12


def held(measured: Measured, config: TrainConfig) -> float:
    """Parameters of one process, before ZeRO: of the experts its part."""
    return measured.total - measured.experts * (1 - 1 / config.engine.expert_parallel)


def memory_of(measured: Measured, config: TrainConfig, gpus: int) -> tuple[dict[str, float], float]:
    """(part -> bytes on one GPU, bytes on the host), after what ZeRO shards at its stage and what is offloaded."""
    stage, offload = config.engine.zero_stage, config.engine.offload
    size = measured.weight_bytes
    weights = held(measured, config) * size / (gpus if stage == 3 else 1)
    gradients = measured.trained * size / (gpus if stage >= 2 else 1)
    optimizer = measured.trained * state_bytes(config) / (gpus if stage >= 1 else 1)
    host = 0.0
    if offload:
        host = (optimizer + gradients) * (gpus if stage >= 1 else 1)
        optimizer = gradients = 0.0
        if stage == 3:
            host += measured.total * size
            weights = 0.0
    buffers = 0.0
    if stage == 3:
        buffers = (min(measured.total, LIVE_PARAMETERS) + min(measured.trained, BUCKET)) * size
    elif stage > 0:
        buffers = 2 * min(measured.trained, BUCKET) * size
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer state": optimizer,
        "activations": measured.activations,
        "gathered weights and buffers": buffers,
        "context": CONTEXT,
    }
    return parts, host


def offload_seconds(measured: Measured, config: TrainConfig, gpus: int, host_bandwidth: float, link: float) -> float:
    """Of a step. Every micro-batch's gradients travel to the host, and the step's weights back; at ZeRO's stage 3
    weights lie there, and travel for every forward and backward, and once more where activations are recomputed.
    """
    if not config.engine.offload:
        return 0.0
    hosts = math.ceil(gpus / GPUS_PER_HOST)
    adamw = measured.trained * ADAMW_BYTES / (hosts * host_bandwidth)
    micro_batches = config.optim.accumulation
    travelling = measured.trained * (micro_batches + 1)
    if config.engine.zero_stage == 3:
        travelling += measured.total * micro_batches * (3 if config.engine.checkpointing != "off" else 2)
    return adamw + travelling * measured.weight_bytes / (gpus * link)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def measure(config: TrainConfig, *, vision: str, language: str, scales: Sequence[int], corpus: Corpus) -> Measured:
    """Runs one batch of average samples, on one GPU, on the meta device."""
    dtype, batch = DTYPES[config.engine.dtype], config.optim.batch_size
    model = meta_model(config, vision=vision, language=language, scales=scales, dtype=dtype)
    own = image_tokens(model)
    recompute_activations(model, config)
    model.train()
    images = round(batch * corpus.images)
    length = min(config.data.max_length, round(own * corpus.images + corpus.text_tokens))
    for parameter in model.parameters():  # gradients are counted by formula, as ZeRO shards them
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    sizes = {"images": images, "batch": batch, "length": length, "dtype": dtype}
    fuse_attention(model)
    with LiveBytes(model) as live:
        run_batch(model, **sizes)
    flops = _flops(model, sizes)
    if images and images != batch * corpus.images:  # a batch has whole images, and samples on average have not
        alone = _flops(model, sizes | {"images": 0})
        flops = alone + (flops - alone) * batch * corpus.images / images
    layers = moe_layers(model).values()
    sizes_of = [(layer.router.spec, sum(p.numel() for p in layer.experts.parameters())) for layer in layers]
    idle = sum(size * (1 - spec.top_k / spec.num_experts) for spec, size in sizes_of)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Measured(
        total=total,
        active=round(total - idle),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        experts=sum(size for _, size in sizes_of),
        moe_layers=len(layers),
        image_tokens=own,
        batch=batch,
        flops=flops,
        activations=live.most,
        weight_bytes=dtype.itemsize,
    )


def _flops(model: nn.Module, sizes: dict[str, Any]) -> float:
    """Without LiveBytes: the counter's hooks keep tensors alive. After it: then the backend's ops are there."""
    from torch.utils.flop_counter import FlopCounterMode

    tell_flop_counter()
    with FlopCounterMode(display=False) as flops:
        run_batch(model, **sizes)
    return flops.get_total_flops()


def meta_model(
    config: TrainConfig, *, vision: str, language: str, scales: Sequence[int], dtype: torch.dtype
) -> nn.Module:
    """The stage's model at true size, without weights."""
    from transformers import LlavaForConditionalGeneration

    text = architecture(language, LANGUAGE)
    llava = compose_config(
        architecture(vision, VISION),
        text,
        image_token_id=text.vocab_size - 1,
        feature_layer=config.model.vision_feature_layer,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava).to(dtype)
    use_scales(model, scales)
    prepare_stage(model, replace(config.model, backend=counted_backend()))
    return model


def counted_backend() -> str:
    """A fused backend: `reference` runs every expert on every token, which no GPU will."""
    missing = ops.available_backends()
    for name in ("cpu", "triton"):
        if missing[name] is None:
            return name
    raise ConfigError(f"plan needs a fused backend to count with: {missing['cpu']}")


def architecture(name: str, known: dict[str, dict[str, Any]]) -> Any:
    """A config of transformers: one of the known, or of a folder, of whose parts a vision tower's is taken."""
    from transformers import AutoConfig

    if name in known:
        values = dict(known[name])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    option = "--vision" if known is VISION else "--language"
    if not name:
        raise ConfigError(f"{option} is not given; choose {', '.join(known)}, or a folder with a config.json")
    if not (Path(name) / "config.json").exists():
        raise CheckpointError(f"{option}: {name} is neither a folder with a config.json nor {' nor '.join(known)}")
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    part = "vision_config" if known is VISION else "text_config"
    return getattr(config, part, config)


def run_batch(model: nn.Module, *, images: int, batch: int, length: int, dtype: torch.dtype) -> None:
    """Forward and backward of a batch. The parts are called one by one: between them LLaVA looks at token numbers."""
    place = {"device": model.device, "dtype": dtype}
    vision, text = model.config.vision_config, model.config.get_text_config()
    tokens = torch.zeros(batch, length, text.hidden_size, **place)
    tokens.requires_grad_(any(p.requires_grad for p in model.model.language_model.parameters()))
    if images:
        pixels = torch.zeros(images, 3, vision.image_size, vision.image_size, **place)
        features = model.model.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        features = torch.cat(list(features)) if isinstance(features, list | tuple) else features
        rows = features.reshape(-1, text.hidden_size)
        tokens = torch.cat([rows, tokens.reshape(-1, text.hidden_size)[len(rows) :]]).view(batch, length, -1)
    mask = torch.zeros(batch, 1, length, length, **place)  # given, so that nobody looks at its values
    hidden = model.model.language_model(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    labels = torch.zeros(batch * length, dtype=torch.long, device=model.device)
    nn.functional.cross_entropy(logits.view(batch * length, -1), labels).backward()


def fuse_attention(model: nn.Module) -> None:
    """Makes attention the one operation that it is on a GPU; on the meta device torch would write it out."""
    from transformers import AttentionInterface

    def attention(module, query, key, value, mask, dropout=0.0, scaling=None, is_causal=None, **_options):
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("libmoe_fast_plan", attention)
    model.set_attn_implementation("libmoe_fast_plan")


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside are alive with, at any one time: without views and the model's own, and
    with what the experts' kernels take for themselves while they run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.now + working_bytes(operator, args))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def working_bytes(operator: Any, args: tuple) -> int:
    """What an op of the experts allocates and frees inside, on a GPU (kernels/experts.py): sorted rows [T*K, ..]."""
    name = operator.name().rpartition("_experts")
    if name[1] == "" or not name[0].startswith("libmoe_fast::"):
        return 0
    if name[2] == "":  # a [.., H], y [.., O]
        _, _, _, order, _, _, _, _, w2, *_ = args
        columns = w2.shape[2] + w2.shape[1]
    else:  # da and then w a [.., H], dz [.., H or 2H]; dx [.., D], unless that is a result
        _, x, _, order, _, _, w1, _, w2, _, _, _, _, sum_over_k, *_ = args
        columns = w2.shape[2] + w1.shape[1] + (x.shape[1] if sum_over_k else 0)
    return order.shape[0] * columns * w2.element_size()
