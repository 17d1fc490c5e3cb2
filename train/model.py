"""The model and processor that a stage trains."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from libmoe_fast.checkpoint import DEFAULT_FORMAT, FORMAT, load_model
from libmoe_fast.errors import CheckpointError, ConfigError, in_one_line
from libmoe_fast.multiscale import scales_of, use_scales
from libmoe_fast.train.chat import IMAGE, TEMPLATES
from libmoe_fast.train.config import ModelConfig, TrainConfig
from libmoe_fast.upcycle import moe_layers, upcycle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_model(config: ModelConfig, *, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A LlavaForConditionalGeneration, ready for its stage, and its LlavaProcessor.

    Stage 1 leaves gradients to the projector alone; stage 3 turns the dense MLPs into experts.

    Raises:
        CheckpointError: a folder is missing, truncated or of another kind of model.
        ConfigError: the options do not fit the model.
    """
    if config.path is not None:
        model, processor = _load(Path(config.path), dtype)
        _check_scales(model, config)
    else:
        model, processor = _compose(config, dtype)
        use_scales(model, config.scales or [1])
    _check_tokenizer(processor.tokenizer)
    end_answers(model, processor.tokenizer)
    prepare_stage(model, config)
    return model, processor


def prepare_stage(model: nn.Module, config: ModelConfig) -> None:
    """Leaves gradients to what the stage trains, and upcycles in stage 3."""
    if config.stage == 1:
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
    if config.stage == 3:
        _upcycle(model, config)


def settle_format(config: TrainConfig, model: nn.Module, processor: Any) -> TrainConfig:
    """The config with chat template and image aspect filled in: as given, else as the model was trained, else defaults.

    Model and processor are told, so that later stages and evaluation find it in what they save.

    Raises:
        ConfigError: what is given contradicts what the checkpoint was trained with, or max_length the model's context.
    """
    known = dict(getattr(model.config, FORMAT, None) or {})
    # A projector alone says little about images: LibMoE pads them from stage 2 on only.
    provisional = known.pop("stage", None) == 1
    given = {"chat_template": config.model.chat_template, "image_aspect": config.data.image_aspect}
    settled = DEFAULT_FORMAT | known
    for name, value in given.items():
        if value is None:
            continue
        if name in known and known[name] != value and not (name == "image_aspect" and provisional):
            section = "model" if name == "chat_template" else "data"
            raise ConfigError(
                f"{section}.{name} is {value!r}, but {config.model.path} was trained with {known[name]!r}; leave the "
                "option out, or start from a checkpoint of that kind"
            )
        settled[name] = value
    if settled["chat_template"] not in TEMPLATES or settled["image_aspect"] not in ("pad", "none"):
        raise ConfigError(f"{config.model.path} was trained with {known}, which this libmoe_fast does not know")
    context = model.config.text_config.max_position_embeddings
    if config.data.max_length > context:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the language model has {context} positions; "
            f"set data.max_length to at most {context}"
        )
    setattr(model.config, FORMAT, settled | ({"stage": 1} if config.model.stage == 1 else {}))
    processor.chat_template = TEMPLATES[settled["chat_template"]].jinja
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, chat_template=settled["chat_template"]),
        data=dataclasses.replace(config.data, image_aspect=settled["image_aspect"]),
    )


def image_tokens(model: nn.Module) -> int:
    """How many tokens one image takes: its patches, and the class token where the vision tower's is kept."""
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    kept_class_token = _has_class_token(vision) and model.config.vision_feature_select_strategy == "full"
    return patches + kept_class_token


def _has_class_token(vision: Any) -> bool:
    return vision.model_type == "clip_vision_model"


def _check_scales(model: nn.Module, config: ModelConfig) -> None:
    if config.scales is not None and tuple(config.scales) != scales_of(model):
        raise ConfigError(
            f"model.scales is {config.scales}, but {config.path} was trained with {list(scales_of(model))}; leave the "
            "option out, or start from a checkpoint of that kind"
        )


def _upcycle(model: nn.Module, config: ModelConfig) -> None:
    if moe_layers(model):
        raise ConfigError(f"{config.path} has experts already; stage 3 upcycles a dense checkpoint, as stage 2 makes")
    upcycle(
        model,
        router=config.router,
        num_experts=config.num_experts,
        top_k=config.top_k,
        targets=tuple(config.targets),
        router_options=config.router_options,
        balance_coef=config.balance_coef,
        z_coef=config.z_coef,
        backend=config.backend,
    )


def _load(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import AutoProcessor

    kind = _model_type(folder)
    if kind != "llava":
        raise CheckpointError(f"{folder} holds a {kind!r} model; expected 'llava'")
    return load_model(folder, dtype=dtype), _pretrained(AutoProcessor, folder)


def _compose(config: ModelConfig, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A new LLaVA of a vision tower, a language model and a random projector."""
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    vision_folder, text_folder = Path(config.vision_tower), Path(config.language_model)
    _model_type(text_folder)
    vision = load_vision_tower(vision_folder, dtype)
    text = _pretrained(AutoModelForCausalLM, text_folder, dtype=dtype)
    tokenizer = load_tokenizer(text_folder)
    if len(tokenizer) > text.config.vocab_size:
        text.resize_token_embeddings(len(tokenizer))
    llava = llava_config(vision.config, text.config, tokenizer, feature_layer=config.vision_feature_layer)
    with torch.device("meta"):  # the shell only: its parts come from elsewhere
        model = LlavaForConditionalGeneration(llava)
    projector = type(model.model.multi_modal_projector)(llava)
    model.model.vision_tower = vision
    model.model.multi_modal_projector = projector.to(dtype)
    model.model.language_model = text.base_model
    model.lm_head = text.lm_head
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # not in a model's config, or another one there
        setattr(model.generation_config, name, getattr(text.generation_config, name))
    return model, make_processor(llava, vision_folder, tokenizer)


def load_tokenizer(folder: Path) -> Any:
    """A language model's tokenizer, which knows <image>, and ends answers at <|end|> where it has that token."""
    from transformers import AutoTokenizer

    tokenizer = _pretrained(AutoTokenizer, folder)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    if "<|end|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|end|>"
    return tokenizer


def llava_config(vision: Any, text: Any, tokenizer: Any, *, feature_layer: int) -> Any:
    """The LlavaConfig of a vision tower and a language model with this tokenizer."""
    return compose_config(
        vision, text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE), feature_layer=feature_layer
    )


def compose_config(vision: Any, text: Any, *, image_token_id: int, feature_layer: int) -> Any:
    """The LlavaConfig of a vision tower's and a language model's config: a class token is dropped, the rest is read."""
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if _has_class_token(vision) else "full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def load_vision_tower(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A CLIP or SigLIP vision tower, from its own folder or from that of a whole CLIP or SigLIP model."""
    from transformers import CLIPVisionModel, SiglipVisionModel

    kind = _model_type(folder)
    if kind in ("clip", "clip_vision_model"):
        return _pretrained(CLIPVisionModel, folder, dtype=dtype)
    if kind in ("siglip", "siglip_vision_model"):
        # LLaVA reads patches; SigLIP's pooling head would only be dead weight.
        return _pretrained(SiglipVisionModel, folder, dtype=dtype, vision_use_head=False)
    raise CheckpointError(f"{folder} holds a {kind!r} model; expected a CLIP or SigLIP vision tower")


def make_processor(llava: Any, vision_folder: Path, tokenizer: Any) -> Any:
    """A LlavaProcessor of the image processor beside a vision tower and a tokenizer."""
    from transformers import AutoImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=_pretrained(AutoImageProcessor, vision_folder),
        tokenizer=tokenizer,
        patch_size=llava.vision_config.patch_size,
        vision_feature_select_strategy=llava.vision_feature_select_strategy,
        num_additional_image_tokens=int(_has_class_token(llava.vision_config)),
        image_token=IMAGE,
    )


def _model_type(folder: Path) -> str:
    """The model_type in a folder's config.json."""
    try:
        return json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a model folder: config.json is missing or broken ({error})") from error


def _pretrained(cls: Any, folder: Path, **options: Any) -> Any:
    """cls.from_pretrained, from the disk only, refusing models with weights missing."""
    is_model = "dtype" in options
    try:
        loaded = cls.from_pretrained(
            folder, local_files_only=True, **options, **({"output_loading_info": True} if is_model else {})
        )
    # safetensors, torch and transformers raise errors of no common kind on truncated and foreign files.
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be loaded as {cls.__name__}: {in_one_line(error)}") from error
    if not is_model:
        return loaded
    model, info = loaded
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise CheckpointError(
            f"{folder} does not fit {cls.__name__}: {len(names)} weights are missing or misshapen, {names[0]} first"
        )
    return model


def end_answers(model: nn.Module, tokenizer: Any) -> None:
    """Adds <|end|> to what generation stops at: a language model's own settings may end documents only."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config.eos_token_id = known if end in known else [*known, end]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _check_tokenizer(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        raise ConfigError("labels are found by character offsets, which needs a fast tokenizer (tokenizer.json)")
    vocabulary = tokenizer.get_vocab()
    for token in (IMAGE, "<|user|>", "<|assistant|>", "<|end|>"):
        if token not in vocabulary:
            raise ConfigError(f"the tokenizer has no token {token}; the chat formats here are Phi-3's and Phi-3.5's")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
