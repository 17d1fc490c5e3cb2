"""S2: a vision tower that looks at each image at several sizes (Shi et al. 2024, arXiv 2403.13043, section 3).

    pixels [B, 3, S, S] -> at scale s: bicubic to [B, 3, sS, sS], cut into s x s tiles, [s*s*B, 3, S, S]
                        -> tower -> [s*s*B, P, D] -> put together, [B, s*h, s*w, D] -> mean over s x s, [B, P, D]
                        -> all scales side by side, [B, P, D * scales], which the projector reads

The tower runs once per scale, on images of the size that it knows, and the number of image tokens stays P. LibMoE's
published scripts use scales 1 and 3: ten passes over a CLIP of 336 pixels for an image of 1,008.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libmoe_fast.errors import ConfigError
from libmoe_fast.layer import MoE

SCALES_KEY = "libmoe_fast_scales"  # of a Hugging Face model's config
LARGEST_SCALE = 16  # 256 tiles per image


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The scales as a tuple; ConfigError unless they are rising whole numbers that begin with 1."""
    whole = isinstance(scales, list | tuple) and all(isinstance(s, int) and not isinstance(s, bool) for s in scales)
    if not whole or list(scales[:1]) != [1] or sorted(set(scales)) != list(scales) or scales[-1] > LARGEST_SCALE:
        raise ConfigError(
            f"scales are {scales!r}; expected rising whole numbers from 1 to {LARGEST_SCALE} that begin with 1, as in "
            "[1, 3]"
        )
    return tuple(scales)


def use_scales(model: nn.Module, scales: Sequence[int]) -> nn.Module:
    """Makes the vision tower of a Hugging Face LLaVA look at `scales` times its image size; in place.

    The projector's first layer then reads D * len(scales) features: unless it does so already it is replaced by a
    fresh one, so call this before the projector is trained, and before `upcycle`. What `save_model` or
    `save_pretrained` write says so, and `load_model` builds it again; a stock `from_pretrained` refuses the
    projector's shape.

    Args:
        scales: rising whole numbers that begin with 1; LibMoE: (1, 3).
    Returns: `model`. Raises ConfigError for other scales, and for models that are no dense LLaVA of one scale.
    """
    scales = check_scales(scales)
    if scales == (1,) == scales_of(model):
        return model
    inner = getattr(model, "model", model)
    tower, projector = getattr(inner, "vision_tower", None), getattr(inner, "multi_modal_projector", None)
    if tower is None or getattr(projector, "linear_1", None) is None:
        raise ConfigError(
            f"{type(model).__name__} has no vision_tower, or no multi_modal_projector of two dense layers; "
            "scales are for a Hugging Face LLaVA before upcycle"
        )
    if any(isinstance(module, MoE) for module in tower.modules()) or multi_scale(tower) is not None:
        raise ConfigError(
            "the vision tower has experts or several scales already; use_scales is for a dense LLaVA, once"
        )
    first = projector.linear_1
    width = model.config.vision_config.hidden_size * len(scales)
    if first.in_features != width:
        projector.linear_1 = nn.Linear(
            width,
            first.out_features,
            bias=first.bias is not None,
            device=first.weight.device,
            dtype=first.weight.dtype,
        ).requires_grad_(first.weight.requires_grad)
    setattr(model.config, SCALES_KEY, list(scales))
    tower.register_forward_hook(MultiScale(scales), with_kwargs=True)
    return model


def scales_of(model: nn.Module) -> tuple[int, ...]:
    """The scales of a model's vision tower: (1,) for an ordinary one."""
    return tuple(getattr(getattr(model, "config", None), SCALES_KEY, None) or (1,))


def passes(model: nn.Module, name: str) -> int:
    """How often the module called `name` runs in one forward of the model: the scales, inside of the vision tower."""
    if scales_of(model) == (1,):
        return 1
    for parent, module in model.named_modules():
        if (hook := multi_scale(module)) is not None and name.startswith(f"{parent}."):
            return len(hook.scales)
    return 1


def multi_scale(tower: nn.Module) -> "MultiScale | None":
    return next((hook for hook in tower._forward_hooks.values() if isinstance(hook, MultiScale)), None)


class MultiScale:
    """Forward hook of a vision tower: runs it once more per larger scale, and makes its hidden states those of all.

    A hook and not a module around the tower, so that all names, and so all checkpoints, stay what they are.
    """

    def __init__(self, scales: Iterable[int]) -> None:
        self.scales = tuple(scales)
        self.inside = False  # of a pass that the hook itself makes

    def __call__(self, tower: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if self.inside:
            return None
        kwargs = dict(kwargs)
        pixels = args[0] if args else kwargs.pop("pixel_values")
        layers = [module for module in tower.modules() if isinstance(module, MoE)]
        states, statistics = [output.hidden_states], [[layer.statistics() for layer in layers]]
        self.inside = True
        try:
            for scale in self.scales[1:]:
                states.append(tower(to_tiles(pixels, scale), **kwargs).hidden_states)
                statistics.append([layer.statistics() for layer in layers])
        finally:
            self.inside = False
        for layer, seen in zip(layers, zip(*statistics, strict=True), strict=True):
            layer.set_statistics(*map(_mean, zip(*seen, strict=True)))
        output.hidden_states = SideBySide(states, self.scales)
        return output


class SideBySide(Sequence):
    """Hidden states of all scales: indexing one layer merges it, so that the layers nobody reads cost nothing."""

    def __init__(self, states: Sequence[Sequence[Tensor]], scales: Sequence[int]) -> None:
        self.states, self.scales = states, scales

    def __len__(self) -> int:
        return len(self.states[0])

    def __getitem__(self, layer: int) -> Tensor:
        """[B, P, D * scales], after a class token's row where the tower has one: of the image at its own size, twice.

        LLaVA's "default" strategy drops that row.
        """
        own, *larger = (state[layer] for state in self.states)  # [B, C + P, D], [s*s*B, C + P, D]
        class_tokens = own.shape[1] - math.isqrt(own.shape[1]) ** 2
        merged = [from_tiles(state[:, class_tokens:], s) for state, s in zip(larger, self.scales[1:], strict=True)]
        return torch.cat([own, *(torch.cat([own[:, :class_tokens], part], dim=1) for part in merged)], dim=-1)


def to_tiles(pixels: Tensor, scale: int) -> Tensor:
    """Images [B, 3, S, S] at `scale` times their size, cut up row by row: [scale * scale * B, 3, S, S], image last."""
    batch, channels, height, width = pixels.shape
    larger = F.interpolate(pixels.float(), size=(height * scale, width * scale), mode="bicubic").to(pixels.dtype)
    tiles = larger.view(batch, channels, scale, height, scale, width).permute(2, 4, 0, 1, 3, 5)
    return tiles.reshape(-1, channels, height, width)


def from_tiles(features: Tensor, scale: int) -> Tensor:
    """Features of `to_tiles`' images, [scale * scale * B, P, D], as means over scale x scale patches: [B, P, D]."""
    tiles, patches, dim = features.shape
    side, batch = math.isqrt(patches), tiles // scale**2
    grid = features.float().view(scale, scale, batch, side, side, dim).permute(2, 0, 3, 1, 4, 5)
    blocks = grid.reshape(batch, side, scale, side, scale, dim)  # the large image's rows and columns, by blocks
    return blocks.mean(dim=(2, 4)).view(batch, patches, dim).to(features.dtype)


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.stack(list(values)).mean(dim=0)
