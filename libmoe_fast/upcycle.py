"""Swap the dense MLPs of a LLaVA's vision encoder and projector for MoE layers, in place.

Which MLPs those are is in targets.py.
"""

import contextlib
import inspect
import logging
import types
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from libmoe_fast import loss_scale
from libmoe_fast.compatibility import installed_version
from libmoe_fast.errors import ConfigError
from libmoe_fast.layer import MoE
from libmoe_fast.multiscale import passes
from libmoe_fast.routers import find_router
from libmoe_fast.spec import Routing, check_choice
from libmoe_fast.targets import Target, check_target, find_dense_mlps

LAYOUT = "libmoe_fast.stacked"  # experts.w1 [N, H, D], experts.w2 [N, O, H]
VERSION = 1
RECIPE_KEY = "libmoe_fast"  # of a Hugging Face model's config
TARGETS = ("vision", "projector")
LOG = logging.getLogger(__name__)


def upcycle(
    model: nn.Module,
    *,
    router: str = "smoe",
    num_experts: int = 4,
    top_k: int = 2,
    targets: Target | Iterable[Target] = TARGETS,
    trainable: bool | None = None,
    aux_over_layers: Literal["mean", "sum"] = "mean",
    **layer_options,
) -> nn.Module:
    """Replaces the MLPs of the vision encoder and the projector by MoE layers whose experts are copies of them.

    Works on Hugging Face's vision-language models, on the original LLaVA, and on any module that holds MLPs of two
    linear layers, or gated ones (`experts.PLAIN_LAYOUTS`, `register_mlp`). Gates are drawn from N(0, 0.02),
    independently per layer. Load the dense weights first; upcycle before deepspeed.initialize.

    The auxiliary losses take the scale of the task's loss when backward begins (accumulation steps, the labels of all
    accumulated batches, the fp16 loss scale), wherever the loss is computed; see `loss_scale`.

    Args:
        targets: what to swap: "vision", "projector", "language", names or patterns of names, functions of (name,
            module), or parts of a target such as "vision[-4:]" (see `targets`).
        trainable: whether experts and routers learn; None keeps what the dense MLPs' requires_grad says for the
            experts, and warns where routers would learn alone.
        aux_over_layers: "mean" averages the auxiliary losses over the layers of a target (LibMoE), so that the
            coefficients mean the same in towers of any depth; "sum" adds them up. Over the scales of a tower that looks
            at several (`use_scales`) they are averaged in any case.
        layer_options: those of MoE from `router` on (router_options, balance_coef, backend, ...).
    Returns: `model`. Raises ConfigError, with nothing swapped, when a target is unknown or nothing of it is found, or
        the options cannot work.
    """
    targets = (targets,) if isinstance(targets, str) or callable(targets) else tuple(targets)
    for target in targets:
        if not callable(target):
            check_target(target)
    check_choice("aux_over_layers", aux_over_layers, ("mean", "sum"))
    # Build all before swapping any: an error halfway must leave the model as it was.
    layers = {}
    for target in targets:
        found = {name: mlp for name, mlp in find_dense_mlps(model, target).items() if name not in layers}
        share = 1 / max(len(found), 1) if aux_over_layers == "mean" else 1.0
        for name, mlp in found.items():
            options = {"aux_weight": share / passes(model, name)}
            own = {"router_options": _numbered(router, layer_options.get("router_options"), len(layers))}
            try:
                layers[name] = MoE.from_dense(
                    mlp, router=router, num_experts=num_experts, top_k=top_k, **(options | layer_options | own)
                )
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
    for layer in layers.values():
        if trainable is not None:
            layer.requires_grad_(trainable)
    install(model, layers)
    if trainable is not False:
        _lift_no_grad(model, layers)
    frozen = [name for name, layer in layers.items() if not layer.experts.w1.requires_grad]
    if frozen and trainable is None:
        warnings.warn(
            f"the experts of {len(frozen)} of {len(layers)} layers are frozen, as their dense MLPs were ({frozen[0]} "
            "first), and their routers are not: upcycle(..., trainable=True) trains both, trainable=False neither",
            stacklevel=2,
        )
    return model


def _numbered(router: str, options: dict | None, number: int) -> dict:
    """The router's options; one that draws from a seed of its own takes the layer's number, if none is given."""
    seeded = "seed" in inspect.signature(find_router(router)).parameters
    return ({"seed": number} if seeded else {}) | (options or {})


def _lift_no_grad(model: nn.Module, layers: Iterable[str]) -> None:
    """Takes @torch.no_grad() off the forward of modules around the layers: the original LLaVA has it on its tower."""
    lifted = []
    for name, module in model.named_modules():
        around = name == "" or any(layer.startswith(f"{name}.") for layer in layers)
        forward = type(module).forward
        if around and inspect.isfunction(forward) and hasattr(forward, "__wrapped__"):
            context = inspect.getclosurevars(forward).nonlocals.get("ctx_factory")  # as torch's decorator keeps it
            if isinstance(getattr(context, "__self__", None), torch.no_grad):
                module.forward = types.MethodType(forward.__wrapped__, module)
                lifted.append(f"{name or 'the model'} ({type(module).__name__})")
    if lifted:
        LOG.warning("upcycle took @torch.no_grad() off the forward of %s, so that experts train", ", ".join(lifted))


def install(model: nn.Module, layers: dict[str, MoE]) -> None:
    """Puts MoE layers at dotted names of `model`, and the hook that serves them on `model` itself.

    A Hugging Face model's configuration takes the recipe along, so that what `save_pretrained` writes, which
    transformers' Trainer calls for its checkpoints, says which layers were swapped.
    """
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        setattr(model.config, RECIPE_KEY, recipe(moe_layers(model)))
    if _forget_statistics not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_forget_statistics)


def recipe(layers: dict[str, MoE]) -> dict:
    """What a checkpoint says of the swapped layers: enough to build a model whose weights have the same names."""
    return {
        "layout": LAYOUT,
        "version": VERSION,
        "transformers": installed_version("transformers"),
        "layers": {name: layer.config() for name, layer in layers.items()},
    }


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Dotted name -> MoE layer, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def set_training_progress(model: nn.Module, step: int, total: int) -> None:
    """Tells the routers that `step` of `total` optimiser steps are done (hyper raises its K with it)."""
    for layer in moe_layers(model).values():
        layer.router.set_progress(step, total)


# ---------------------------------------------------------------------------------------------------------------------
# Scaling of the auxiliary loss


def scale_aux_loss(loss: Tensor) -> Tensor:
    """Returns `loss`, a mean; in backward the auxiliary losses take the scale of the gradient that arrives at it.

    The scale is found without it wherever the graph shows it (see loss_scale). Call it where it does not: a loss that a
    fused kernel sums up and that is divided by the labels of several batches, or one of several terms.
    """
    loss_scale.mark(loss)
    return loss


def _forget_statistics(model: nn.Module, _inputs) -> None:
    for layer in moe_layers(model).values():
        layer.clear_statistics()


@contextlib.contextmanager
def aux_loss_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes attach no auxiliary loss and leave the logged values alone (dummy images, probes)."""
    layers = list(moe_layers(model).values())
    modes = [layer.aux_mode for layer in layers]
    for layer in layers:
        layer.aux_mode = "off"
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.aux_mode = mode


# ---------------------------------------------------------------------------------------------------------------------
# Routing records


@dataclass(frozen=True)
class RoutingRecorder:
    """records: dotted layer name -> one Routing per forward, with the leading shape of x kept: [images, tokens, ..]."""

    records: dict[str, list[Routing]]

    def clear(self) -> None:
        for routings in self.records.values():
            routings.clear()


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Inside, every MoE forward appends its Routing (detached, on its device, no host sync) to the recorder."""
    layers = moe_layers(model)
    recorder = RoutingRecorder({name: [] for name in layers})
    for name, layer in layers.items():
        layer._records = recorder.records[name]
    try:
        yield recorder
    finally:
        for layer in layers.values():
            layer._records = None
