"""Which dense MLPs of a model become experts.

    "vision"                  the MLPs of the vision tower, its pooling head and its projector left out
    "projector"               the MLPs between the vision tower and the language model
    "language"                the MLPs of everything else
    "model.layers.*.mlp"      those whose dotted names match a pattern (fnmatch), or have this very name
    lambda name, module: ..   those for which a function says so
    "vision[::2]"             every second of a target, in model order; "vision[-4:]" the last four

A dense MLP is known by the names of its layers (experts.find_layers), not by its class: every model library copies the
same few, under names of its own.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator

from torch import nn

from libmoe_fast.errors import ConfigError
from libmoe_fast.experts import is_dense_mlp
from libmoe_fast.layer import MoE

Target = str | Callable[[str, nn.Module], bool]

KINDS = ("vision", "projector", "language")
# The last name of modules that lead from the vision tower to the language model, in Hugging Face's models (LLaVA's
# family, Idefics, Qwen-VL) and in the original LLaVA, MoE-LLaVA, TinyLLaVA and InternVL.
PROJECTOR_NAMES = {
    "multi_modal_projector",
    "mm_projector",
    "image_projector",
    "image_spatial_proj",
    "connector",
    "merger",
    "deepstack_merger_list",
    "mlp1",
}
PROJECTOR_CLASS = "MultiModalProjector"
VISION_CLASS = "Vision"
VISION_NAMES = {"vision_tower", "vision_model", "visual", "image_tower"}
LANGUAGE_NAMES = {"language_model", "lm_head", "embed_tokens"}
POOLING_HEAD = "PoolingHead"  # SigLIP's: a LLaVA reads the patches, not what it pools
SLICED = re.compile(r"(.*?)\[(-?\d*):(-?\d*)(?::(-?\d*))?\]")


def find_dense_mlps(model: nn.Module, target: Target) -> dict[str, nn.Module]:
    """Dotted name -> dense MLP, in model order.

    Raises ConfigError for a target that is not there, or one that has experts of another library, and says what was
    found in its place.
    """
    if callable(target):
        found = {name: module for name, module in model.named_modules() if name and target(name, module)}
        return _not_empty(found, model, "the given function takes none of its modules")
    name, part = _split(target)
    if name in KINDS:
        found = dict(_FINDERS[name](model))
        missing = f"it has no {name} MLP to upcycle{_seen(model, name)}"
    else:
        found = {n: m for n, m in model.named_modules() if n and fnmatch.fnmatchcase(n, name)}
        missing = f"no module is called {name!r}; give one of {', '.join(KINDS)}, a name or a pattern"
    chosen = dict(list(_not_empty(found, model, missing).items())[part])
    return _not_empty(chosen, model, f"{target!r} takes none")


def check_target(target: str) -> None:
    """Raises ConfigError for what cannot be a target of any model."""
    name, _ = _split(target)
    if name not in KINDS and not re.search(r"[.*?]", name):
        raise ConfigError(f"unknown upcycle target {target!r}; choose of {', '.join(KINDS)}, or a pattern of names")


def _split(target: str) -> tuple[str, slice]:
    if not isinstance(target, str):
        raise ConfigError(f"upcycle target {target!r} is no name, pattern or function")
    if matched := SLICED.fullmatch(target):
        bounds = [int(bound) if bound else None for bound in matched.groups()[1:]]
        if bounds[2] == 0:
            raise ConfigError(f"upcycle target {target!r} has step 0")
        return matched[1], slice(*bounds)
    return target, slice(None)


def _not_empty(found: dict[str, nn.Module], model: nn.Module, reason: str) -> dict[str, nn.Module]:
    if not found:
        raise ConfigError(f"{type(model).__name__}: {reason}")
    for name in found:
        if "experts" in name.split("."):
            raise ConfigError(
                f"{name} is an expert of a mixture already (CuMo's and LibMoE's towers have such); "
                "upcycle the dense model"
            )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Vision, projector, language


def _vision(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    projectors, heads = _roots(model, _is_projector), _roots(model, _is_pooling_head)
    towers = _roots(model, _is_tower) or ([""] if _is_bare_tower(model) else [])
    for name, module in model.named_modules():
        inside = _inside(name, towers) and not _inside(name, projectors) and not _inside(name, heads)
        if inside and is_dense_mlp(module) and not isinstance(module, nn.Sequential):
            yield name, module


def _projector(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    projectors = _roots(model, _is_projector)
    for name, module in model.named_modules():
        if _inside(name, projectors) and is_dense_mlp(module):
            yield name, module


def _language(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    elsewhere = [*_roots(model, _is_tower), *_roots(model, _is_projector)]
    if _is_bare_tower(model):
        return
    for name, module in model.named_modules():
        if not _inside(name, elsewhere) and is_dense_mlp(module) and not isinstance(module, nn.Sequential):
            yield name, module


_FINDERS = {"vision": _vision, "projector": _projector, "language": _language}


def _is_projector(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] in PROJECTOR_NAMES or PROJECTOR_CLASS in type(module).__name__


def _is_tower(name: str, module: nn.Module) -> bool:
    """By the class, since a CLIP model's text encoder has the same MLPs, or by the name that models give it.

    A whole model of vision and language may have such a class, too.
    """
    called_so = VISION_CLASS in type(module).__name__ or name.rpartition(".")[2] in VISION_NAMES
    return called_so and not any(n.rpartition(".")[2] in LANGUAGE_NAMES for n, _ in module.named_modules())


def _is_pooling_head(name: str, module: nn.Module) -> bool:
    return POOLING_HEAD in type(module).__name__


def _is_bare_tower(model: nn.Module) -> bool:
    """DINOv2, ViT: a model of images alone, by its configuration."""
    config = getattr(model, "config", None)
    return hasattr(config, "patch_size") and not hasattr(config, "text_config") and not hasattr(config, "vocab_size")


def _roots(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> list[str]:
    """Names of the modules that match, the outermost ones; "" is the model itself."""
    roots: list[str] = []
    for name, module in model.named_modules():
        if not _inside(name, roots) and matches(name, module):
            roots.append(name)
    return roots


def _inside(name: str, roots: list[str]) -> bool:
    return any(root in ("", name) or name.startswith(f"{root}.") for root in roots)


def _seen(model: nn.Module, kind: str) -> str:
    """What stands where such an MLP would be: for the words of an error."""
    if any(isinstance(module, MoE) for module in model.modules()):
        return " (it has been upcycled before)"
    if kind == "language":
        return ""
    roots = _roots(model, _is_projector if kind == "projector" else _is_tower)
    if not roots:
        return f"; nothing in it is called or looks like a {'projector' if kind == 'projector' else 'vision tower'}"
    holders = {}
    for name, module in model.named_modules():
        layers = {child: type(layer).__name__ for child, layer in module.named_children()}
        if _inside(name, roots) and "Linear" in layers.values():
            holders[type(module).__name__] = ", ".join(layers)
    listed = "; ".join(f"{cls} ({layers})" for cls, layers in list(holders.items())[:3])
    return f"; in {roots[0]} there is {listed}" if listed else f"; in {roots[0]} there is no linear layer"
