"""Published checkpoints to ours and back: LibMoE's experts and routers, and the dense models of LLaVA's family.

Every tensor is accounted for: one that has no place, a place that no tensor fills, and another shape are errors. What
the published code keeps but never reads is left out, and said.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from libmoe_fast.checkpoint import (
    DEFAULT_FORMAT,
    FORMAT,
    RECIPE_FILE,
    empty_weights,
    leave_out,
    load_model,
    reading,
    replace_folder,
    save_model,
)
from libmoe_fast.errors import CheckpointError, ConfigError
from libmoe_fast.multiscale import check_scales, scales_of, use_scales
from libmoe_fast.published_names import CONSTANT, EXPERT, our_name, prefixes_of, their_tensors
from libmoe_fast.upcycle import moe_layers, upcycle

# LibMoE's name -> our router, and options that compute what it does.
ROUTERS = {
    "v1.1": {
        "smoe": ("smoe", {}),
        "smoe_cosinegating": ("cosine", {}),
        "smoe_perturbed": ("perturbed_cosine", {}),
        "smoe_sigmoidgating": ("sigmoid", {}),
        "hyperrouter": ("hyper", {}),
    },
    "v2": {
        "smoe": ("smoe", {}),
        "smoe_sigmoidgating": ("sigmoid", {"normalize": "sum"}),  # no bias, and divided by the sum of the sigmoids
        "xmoe": ("xmoe", {}),
        "smoe_share": ("shared_v2", {}),
        "smoe_sharev3": ("shared_v3", {}),
        "smoe_tcmoe": ("tc_moe", {}),
        "smoe_plus_plus": ("moe_plus_plus", {}),
    },
}
LANGUAGE_MODELS = {"llava_phi": "phi3", "llava_llama": "llama", "llava": "llama", "llava_mistral": "mistral"}

# The tower that LLaVA reads ends before these; some files have them and others do not.
UNREAD = re.compile(r"(post_layernorm\.|head\.|position_ids$|rotary_emb\.inv_freq$)")
PRE_LAYER_NORM = "pre_layrnorm"  # CLIP's own spelling
UNSTACKED = ("hyper_embedding", *CONSTANT)  # of another number of dimensions than ours


@dataclass
class Report:
    """What a conversion did: its own words, for a person to read."""

    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["libmoe_fast", "libmoe"] = "libmoe_fast",
    vision_tower: str | Path | None = None,
    version: Literal["v1.1", "v2"] | None = None,
    chat_template: str | None = None,
) -> Report:
    """Converts the checkpoint folder `source` into the folder `out`; `source` is only read.

    Args:
        to: "libmoe_fast" makes of a LibMoE, LLaVA or CuMo folder (weights, config.json, tokenizer) what `load_model`,
            `evaluate` and stage 3 of `train` take; "libmoe" makes of one of ours LibMoE's names, one tensor per expert.
        vision_tower: folder of the CLIP or SigLIP that it was trained with: its config and image processor, and its
            weights where the checkpoint has none.
        version: of LibMoE, for checkpoints with experts: v1.1's CLIP tower never calls its first layer norm, v2's does,
            and their sigmoid gates differ; nothing in the files tells.
        chat_template: the chat format of the language model, phi3 or phi3.5; none given = by its context length.

    Raises:
        ConfigError: an option is missing or impossible.
        CheckpointError: a tensor has no place, a place has no tensor, or a shape is another; nothing is written.
    """
    source, out = Path(source), Path(out)
    if version is not None and version not in ROUTERS:
        raise ConfigError(f"version is {version!r}; choose {' or '.join(ROUTERS)}")
    if not source.is_dir():
        raise CheckpointError(f"no checkpoint folder {source}")
    if to == "libmoe":
        return _to_libmoe(source, out, version)
    if (source / RECIPE_FILE).exists():
        raise ConfigError(f"{source} is a checkpoint of libmoe_fast already; --to libmoe converts it back")
    with reading(source / "config.json"):
        config = json.loads((source / "config.json").read_text())
    if "text_config" in config:
        raise ConfigError(f"{source} is a Hugging Face model already; libmoe_fast.load_model reads it as it is")
    if vision_tower is None:
        raise ConfigError(
            "name the folder of the CLIP or SigLIP that the checkpoint was trained with (its config says "
            f"{config.get('mm_vision_tower')!r}), as in --vision_tower models/clip: its sizes are not in the checkpoint"
        )
    return _to_ours(source, out, config, Path(vision_tower), version, chat_template)


# ---------------------------------------------------------------------------------------------------------------------
# To ours


def _to_ours(
    source: Path, out: Path, config: dict[str, Any], vision_folder: Path, version: str | None, template: str | None
) -> Report:
    from libmoe_fast.train.chat import TEMPLATES
    from libmoe_fast.train.model import end_answers, llava_config, load_tokenizer, load_vision_tower, make_processor

    report, state = Report(), _read(source)
    dtype = state["model.embed_tokens.weight"].dtype if "model.embed_tokens.weight" in state else torch.float32
    tower = load_vision_tower(vision_folder, dtype)
    if not any("vision_tower." in name for name in state):
        state |= {f"model.vision_tower.vision_model.{_bare(n)}": t for n, t in tower.state_dict().items()}
        report.lines.append(f"vision tower: none in the checkpoint, taken from {vision_folder}")
    tokenizer = load_tokenizer(source)
    _widen_vocabulary(state, len(tokenizer), report)
    text = _text_config(config, source, vocabulary=state["model.embed_tokens.weight"].shape[0])
    layer = config.get("mm_vision_select_layer", -2)
    with empty_weights():
        model = _llava(llava_config(tower.config, text, tokenizer, feature_layer=layer))
        use_scales(model, _scales(config))
        _add_experts(model, state, config, version, report)
    filled = _placed(state, model, report)
    model.load_state_dict(filled, strict=False, assign=True)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    processor = make_processor(model.config, vision_folder, tokenizer)
    if "<|end|>" in tokenizer.get_vocab():
        end_answers(model, tokenizer)
        template = template or ("phi3.5" if text.max_position_embeddings > 65536 else "phi3")
        if template not in TEMPLATES:
            raise ConfigError(f"chat_template is {template!r}; choose one of {', '.join(TEMPLATES)}")
        aspect = "pad" if config.get("image_aspect_ratio", DEFAULT_FORMAT["image_aspect"]) == "pad" else "none"
        setattr(model.config, FORMAT, {"chat_template": template, "image_aspect": aspect})
        processor.chat_template = TEMPLATES[template].jinja
        report.lines.append(f"chat format {template}, image aspect {aspect}")
    else:
        report.lines.append("chat format: none set, the tokenizer has no <|end|>; train and evaluate know Phi-3's")
    save_model(model, out, processor=processor)
    layers = moe_layers(model)
    kind = f"{len(layers)} MoE layers" if layers else "dense"
    report.lines.append(f"{len(filled)} tensors, {kind}, scales {list(scales_of(model))}: {out}")
    return report


def _read(source: Path) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors or .bin files, in shards or whole, and LibMoE's clip.bin beside them."""
    from safetensors.torch import load_file

    whole = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not whole:
        raise CheckpointError(f"{source} has no weights: expected *.safetensors or pytorch_model*.bin")
    state: dict[str, Tensor] = {}
    for path in [*whole, *(p for name in ("mm_projector", "clip") if (p := source / f"{name}.bin").exists())]:
        with reading(path):
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        if path.name == "clip.bin":  # without the model's own prefix
            found = {f"model.vision_tower.{name}": tensor for name, tensor in found.items()}
        state |= found
    return state


def _scales(config: Mapping[str, Any]) -> tuple[int, ...]:
    scales = config.get("scales", [1])
    return check_scales([int(s) for s in (scales.split(",") if isinstance(scales, str) else scales)])


def _text_config(config: dict[str, Any], source: Path, *, vocabulary: int) -> Any:
    from transformers import AutoConfig

    kind = LANGUAGE_MODELS.get(config.get("model_type"))
    if kind is None:
        raise CheckpointError(
            f"{source}/config.json has model_type {config.get('model_type')!r}; known: {', '.join(LANGUAGE_MODELS)}"
        )
    with reading(source / "config.json"):
        known = AutoConfig.for_model(kind).to_dict()
        own = {name: value for name, value in config.items() if name in known and name != "model_type"}
        return AutoConfig.for_model(kind, **own | {"vocab_size": vocabulary, "architectures": None})


def _llava(config: Any) -> nn.Module:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(config)


def _widen_vocabulary(state: dict[str, Tensor], tokens: int, report: Report) -> None:
    """Rows for tokens that the checkpoint has none for (<image>): the mean of the others."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state.get(name)
        if rows is not None and len(rows) < tokens:
            state[name] = torch.cat([rows, rows.float().mean(0).to(rows.dtype).expand(tokens - len(rows), -1)])
            report.lines.append(f"{name}: {tokens - len(rows)} rows added for new tokens, the mean of the others")


def _add_experts(
    model: nn.Module, state: dict[str, Tensor], config: dict[str, Any], version: str | None, report: Report
) -> None:
    places = {part: any(part in n and ".moelayer." in n for n in state) for part in ("vision_tower", "mm_projector")}
    if not any(places.values()):
        return
    if version is None:
        raise ConfigError("the checkpoint has experts: say which LibMoE wrote it, as in --version v1.1 (or v2)")
    name = config.get("moe_name")
    if name not in ROUTERS[version]:
        raise ConfigError(f"LibMoE {version}'s router {name!r} is not known; known: {', '.join(ROUTERS[version])}")
    router, options = ROUTERS[version][name]
    numbers = [int(found[1]) for n in state if (found := EXPERT.search(n))]
    upcycle(
        model,
        router=router,
        router_options=options,
        num_experts=max(numbers, default=0) + 1,
        top_k=config.get("num_selected", 2),
        targets=[ours for part, ours in (("vision_tower", "vision"), ("mm_projector", "projector")) if places[part]],
    )
    report.lines.append(f"router {name} of LibMoE {version}: {router} {options or ''}".rstrip())
    if router == "hyper":  # made by the hypernetwork; what the file has is of some step or other
        _drop(state, [n for n in state if ".moelayer.gate." in n], "generated by the hypernetwork", report)
    if router == "xmoe":
        _drop(state, [n for n in state if n.endswith(".moelayer.gate.weight")], "XMoE never reads it", report)
    if router == "moe_plus_plus":
        _drop(
            state, [n for n in state if n.endswith(".moelayer.gate_transform.weight")], "MoE++ never reads it", report
        )
    if version == "v2" and router == "sigmoid":  # zero in ours
        for layer in [n.removesuffix("gate.weight") for n in state if n.endswith("moelayer.gate.weight")]:
            state[f"{layer}gate.bias"] = torch.zeros_like(state[f"{layer}gate.weight"][:, 0])
    skipped = [n for n in state if f".{PRE_LAYER_NORM}." in n]
    if version == "v1.1" and places["vision_tower"] and skipped:
        _drop(state, skipped, "v1.1's tower never calls it", report)
        leave_out(model, [n for n, _ in model.named_modules() if n.endswith(PRE_LAYER_NORM)])


def _drop(state: dict[str, Tensor], names: list[str], reason: str, report: Report) -> None:
    for name in names:
        del state[name]
    if names:
        report.lines.append(f"left out, {reason}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}")


def _placed(state: dict[str, Tensor], model: nn.Module, report: Report) -> dict[str, Tensor]:
    """The model's state_dict, filled from `state`."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    prefixes = prefixes_of(expected)
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    homeless = []
    for name, tensor in state.items():
        target, expert = our_name(name, prefixes)
        if target not in expected or target in found:  # a second tensor for one place
            homeless.append(name)
        elif expert is None:
            found[target] = tensor.reshape(expected[target]) if name.endswith(UNSTACKED) else tensor
        else:
            stacks.setdefault(target, {})[expert] = tensor
    for target, experts in stacks.items():
        found[target] = _stacked(target, experts, expected[target][0])
    _drop(state, [name for name in homeless if UNREAD.search(name)], "LLaVA does not read it", report)
    homeless = [name for name in homeless if not UNREAD.search(name)]
    if model.config.tie_word_embeddings:
        found.setdefault(f"{prefixes['lm_head.']}weight", found.get(f"{prefixes['model.']}embed_tokens.weight"))
    missing = [name for name in expected if name not in found]
    for name in [name for name in missing if UNREAD.search(name)]:
        found[name] = (torch.ones if name.endswith("weight") else torch.zeros)(expected[name]).to(tensor.dtype)
        missing.remove(name)
        report.lines.append(f"not in the checkpoint and not read by LLaVA: {name}, filled with its start")
    if homeless or missing:
        raise CheckpointError(
            f"the checkpoint does not fit: {len(homeless)} tensors have no place ({', '.join(homeless[:3]) or '-'}), "
            f"{len(missing)} places no tensor ({', '.join(missing[:3]) or '-'})"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise CheckpointError(f"{name} would be {list(tensor.shape)}; expected {list(expected[name])}")
    return found


def _stacked(target: str, experts: dict[int, Tensor], number: int) -> Tensor:
    if missing := set(range(number)) - experts.keys():
        raise CheckpointError(f"{target}: expert {min(missing)} is missing")
    if len(shapes := {tuple(expert.shape) for expert in experts.values()}) > 1:
        raise CheckpointError(f"{target}: its experts have several shapes, {', '.join(map(str, sorted(shapes)))}")
    return torch.stack([experts[e] for e in range(number)])


def _bare(name: str) -> str:
    return name.removeprefix("vision_model.")


# ---------------------------------------------------------------------------------------------------------------------
# Back to LibMoE's names


def _to_libmoe(source: Path, out: Path, version: str | None) -> Report:
    """The weights under LibMoE's names, with its configuration and the tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoProcessor

    model = load_model(source)
    layers = moe_layers(model)
    if not layers:
        raise ConfigError(f"{source} is dense; converting back is for checkpoints with experts")
    if version is None:
        raise ConfigError("say for which LibMoE, as in --version v1.1 (or v2)")
    name = _libmoe_router(layers, version)
    skips = not any(n.endswith(PRE_LAYER_NORM) and not isinstance(m, nn.Identity) for n, m in model.named_modules())
    if version == "v1.1" and not skips:
        raise ConfigError(f"{source} has a CLIP tower that calls {PRE_LAYER_NORM}, and v1.1's never does: use v2")
    state = dict(their_tensors(model))
    text = model.config.get_text_config().to_dict()
    own = {kind: theirs for theirs, kind in reversed(LANGUAGE_MODELS.items())}
    first = next(iter(layers.values()))
    config = text | {
        "model_type": own.get(text["model_type"], text["model_type"]),
        "moe_name": name,
        "num_experts": first.experts.num_experts,
        "num_selected": first.router.spec.top_k,
        "scales": list(scales_of(model)),
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_projector_type": "moe",
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "clip_smoe": any("vision" in n for n in layers),
        "mlp_smoe": any("projector" in n for n in layers),
    }
    with replace_folder(out) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=1, default=str))
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        AutoProcessor.from_pretrained(source).save_pretrained(partial)
    return Report([f"{len(state)} tensors under the names of LibMoE {version}, router {name}: {out}"])


def _libmoe_router(layers: Mapping[str, Any], version: str) -> str:
    kinds = {(layer.router_name, layer.router_options.get("normalize")) for layer in layers.values()}
    options = {n: {o: v for o, v in layer.router_options.items() if o != "seed"} for n, layer in layers.items()}
    for theirs, (ours, needed) in ROUTERS[version].items():
        if kinds == {(ours, needed.get("normalize"))} and all(given == needed for given in options.values()):
            return theirs
    given = sorted({f"{layer.router_name} {options[n] or ''}".strip() for n, layer in layers.items()})
    known = ", ".join(ROUTERS[version])
    raise ConfigError(f"LibMoE {version} has no router that is {', '.join(given)}; it has {known}")
