"""Stacked expert weights, fresh or copied from a dense MLP (sparse upcycling, Komatsuzaki et al. 2022)."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libmoe_fast import ops
from libmoe_fast.errors import ConfigError
from libmoe_fast.reference import ACTIVATIONS
from libmoe_fast.spec import Routing, check_choice, check_size


class Experts(nn.Module):
    """N two-layer MLPs as stacked tensors: w1 [N, H, D] ([N, 2H, D] gated), bias1 [N, H or 2H],
    w2 [N, O, H], bias2 [N, O].

    activation: one of reference.ACTIVATIONS. gated: act(gate) * up, w1 holding gate rows, then up rows.
    bias: for both layers, or a pair (first, second). They are called biases in full for those who go by names, such as
    transformers' Trainer, which decays no parameter called "bias".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        num_experts: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool | tuple[bool, bool] = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("gated", gated, (False, True))
        sizes = {"in_features": in_features, "hidden_features": hidden_features, "out_features": out_features}
        for name, size in (sizes | {"num_experts": num_experts}).items():
            check_size(name, size)
        both = [bias, bias] if isinstance(bias, bool) else bias
        if not isinstance(both, list | tuple) or [type(each) for each in both] != [bool, bool]:
            raise ConfigError(f"bias is {bias!r}; give True or False, or such a pair for the two layers")
        self.in_features, self.hidden_features, self.out_features = in_features, hidden_features, out_features
        self.num_experts, self.activation, self.gated = num_experts, activation, gated
        self.bias = tuple(both)
        up_rows = hidden_features * (2 if gated else 1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.w1 = parameter(up_rows, in_features)
        self.bias1 = parameter(up_rows) if self.bias[0] else None
        self.w2 = parameter(out_features, hidden_features)
        self.bias2 = parameter(out_features) if self.bias[1] else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear initialises each expert's layers: uniform within 1 / sqrt(fan-in)."""
        for weight, bias in ((self.w1, self.bias1), (self.w2, self.bias2)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @classmethod
    def from_dense(cls, mlp: nn.Module, num_experts: int) -> "Experts":
        """`num_experts` copies of a dense MLP, with its dtype, device and requires_grad. See `dense_parts`.

        Of one whose weights DeepSpeed has partitioned (transformers' from_pretrained under ZeRO-3 does), every process
        gathers and copies the whole; deepspeed.initialize partitions the copies.
        """
        experts, norm = cls.with_norm(mlp, num_experts)
        if norm is not None:
            raise ConfigError(
                f"{type(mlp).__name__} begins with a layer norm, which experts would lose; MoE.from_dense keeps it"
            )
        return experts

    @classmethod
    def with_norm(cls, mlp: nn.Module, num_experts: int) -> tuple["Experts", nn.LayerNorm | None]:
        """`from_dense`, and a copy of the layer norm that the MLP begins with, if it does."""
        with unpartitioned(mlp.parameters()):
            parts = dense_parts(mlp)
            return cls._from_parts(parts, num_experts), copy.deepcopy(parts.norm)

    @classmethod
    def _from_parts(cls, parts: "DenseParts", num_experts: int) -> "Experts":
        out_features, hidden_features = parts.w2.shape
        experts = cls(
            parts.w1.shape[1],
            hidden_features,
            out_features,
            num_experts=num_experts,
            activation=parts.activation,
            gated=parts.gated,
            bias=(parts.b1 is not None, parts.b2 is not None),
            device="meta",  # shapes only: the parameters are replaced below
        )
        names = {"w1": parts.w1, "bias1": parts.b1, "w2": parts.w2, "bias2": parts.b2}
        for name, dense in names.items():
            if dense is not None:
                stacked = dense.detach().expand(num_experts, *dense.shape).clone()  # [N, ...]
                setattr(experts, name, nn.Parameter(stacked, requires_grad=dense.requires_grad))
        return experts

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """Reads also what was saved when the biases were called b1 and b2."""
        for number in "12":
            if (old := f"{prefix}b{number}") in state_dict:
                state_dict[f"{prefix}bias{number}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None, *, counted: bool = False) -> Tensor:
        """x [T, D] -> [T, O]: the weighted sum of each token's chosen experts. counted: see ops.experts."""
        tensors = (self.w1, self.bias1, self.w2, self.bias2)
        if x.dtype != self.w1.dtype:  # under autocast, as nn.Linear does
            tensors = (None if t is None else t.to(x.dtype) for t in tensors)
        options = {"activation": self.activation, "gated": self.gated, "counted": counted}
        return ops.experts(x, routing, *tensors, backend=backend, **options)

    def extra_repr(self) -> str:
        shape = f"{self.in_features} -> {self.hidden_features} -> {self.out_features}"
        return f"{self.num_experts} x {shape}, {self.activation}{', gated' if self.gated else ''}"


class DenseParts(NamedTuple):
    """A dense MLP taken apart: w1 [H or 2H, D], b1, w2 [O, H], b2, the activation's name, whether it is gated, and the
    layer norm that it begins with, if it does."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    activation: str
    gated: bool
    norm: nn.LayerNorm | None = None


# Attribute names (first layer, activation, second layer) of plain two-layer MLPs.
PLAIN_LAYOUTS = (
    ("fc1", "activation_fn", "fc2"),  # CLIPMLP, SiglipMLP, Idefics3's, InternVL's
    ("fc1", "act", "fc2"),  # Qwen2-VL's VisionMlp
    ("fc1", "activation", "fc2"),  # Dinov2MLP
    ("linear_fc1", "act_fn", "linear_fc2"),  # Qwen3-VL's
    ("linear_1", "act", "linear_2"),  # LlavaMultiModalProjector and its kin
)
# Attribute names (first layers, activation, second layer) of gated MLPs.
GATED_LAYOUTS = (
    (("gate_proj", "up_proj"), "act_fn", "down_proj"),  # LlamaMLP, MistralMLP, Qwen2MLP, PixtralMLP
    (("gate_up_proj",), "activation_fn", "down_proj"),  # Phi3MLP
)
# Attribute names of a layer norm that comes before the first layer: VipLLaVA's and InternVL's projectors.
NORMS = ("projector_layernorm", "layer_norm")
# Class name of an MLP -> what takes it apart; see register_mlp.
ADAPTERS: dict[str, Callable[[nn.Module], DenseParts]] = {}


def register_mlp(name: str) -> Callable:
    """Registers a function that takes an MLP class of this name apart: `mlp -> DenseParts`.

    For MLPs that are two linear layers, or gated ones, under names of their own or fused in another way:

        @libmoe_fast.register_mlp("MyMLP")
        def take_apart(mlp):
            return libmoe_fast.DenseParts(mlp.a.weight, mlp.a.bias, mlp.b.weight, mlp.b.bias, "gelu", False)

    What it returns is compared with the module's own forward on a few tokens, like every other MLP.
    """

    def register(function: Callable[[nn.Module], DenseParts]) -> Callable[[nn.Module], DenseParts]:
        ADAPTERS[name] = function
        return function

    return register


def is_dense_mlp(module: nn.Module) -> bool:
    """Whether `dense_parts` would know the module by its layers' names, or by a registered adapter."""
    if type(module).__name__ in ADAPTERS:
        return True
    try:
        layers, _, _ = find_layers(module)
    except ConfigError:
        return False
    return all(hasattr(layer, "weight") for layer in layers)


def dense_parts(mlp: nn.Module) -> DenseParts:
    """Takes a dense MLP apart: CLIPMLP, SiglipMLP, LlavaMultiModalProjector, nn.Sequential(Linear, act, Linear),
    and the gated MLPs of Llama and Phi-3.

    Raises ConfigError, naming the part, for what a copy of the weights would lose: a module of another kind, further
    children or tensors, layers that are no plain nn.Linear (adapters, quantised, parametrised, pruned), hooks, an
    unknown activation, and a forward that computes something else.
    """
    if (adapter := ADAPTERS.get(type(mlp).__name__)) is not None:
        parts = adapter(mlp)
        _compare_with_forward(mlp, parts)
        return parts
    layers, act, gated = find_layers(mlp)
    norm = find_norm(mlp)
    _refuse_what_a_copy_loses(mlp, layers, norm)
    *first, second = layers

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(layer, name) for layer in first]
        if len(tensors) == 1 or tensors[0] is None:
            return tensors[0]
        return torch.cat([t.detach() for t in tensors]).requires_grad_(tensors[0].requires_grad)

    parts = DenseParts(joined("weight"), joined("bias"), second.weight, second.bias, activation_name(act), gated, norm)
    _compare_with_forward(mlp, parts)
    return parts


def stack_dense(state: dict[str, Tensor], num_experts: int, *, gated: bool) -> dict[str, Tensor] | None:
    """The weights of a dense MLP, by its own names, as those of `num_experts` copies; None if they are no such MLP's.

    state: what is stored of one module, {"fc1.weight": [H, D], "fc1.bias": [H], "fc2.weight": [O, H], ...}.
    """
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    known = [(firsts, second) for firsts, _, second in GATED_LAYOUTS] if gated else []
    known += [] if gated else [((first,), second) for first, _, second in PLAIN_LAYOUTS]
    if not gated and len(layers) == 2 and all(layer.isdigit() for layer in layers):  # nn.Sequential's
        known.append(((min(layers, key=int),), max(layers, key=int)))
    for firsts, second in known:
        if {*firsts, second} == set(layers) and all(f"{layer}.weight" in state for layer in layers):
            stacked = {}
            for name, parts in (("1", firsts), ("2", (second,))):
                for kind, field in (("w", "weight"), ("bias", "bias")):
                    tensors = [state[key] for layer in parts if (key := f"{layer}.{field}") in state]
                    if tensors:
                        whole = torch.cat(tensors)
                        stacked[kind + name] = whole.expand(num_experts, *whole.shape)  # [N, ...]
            return stacked
    return None


def split_norm(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is stored of a dense MLP: without its layer norm, and of that alone, {"weight": [D], "bias": [D]}."""
    norm = {name.rpartition(".")[2]: tensor for name, tensor in state.items() if name.rpartition(".")[0] in NORMS}
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in NORMS}, norm


def find_layers(mlp: nn.Module) -> tuple[list[nn.Module], nn.Module, bool]:
    """(its linear layers, its activation, gated) or ConfigError."""
    # What computes nothing may stand beside the layers.
    norm = find_norm(mlp)
    children = {name: child for name, child in mlp.named_children() if not _does_nothing(child) and child is not norm}
    if isinstance(mlp, nn.Sequential) and len(children) == 3:
        first, act, second = children.values()
        return [first, second], act, False
    for first, act, second in PLAIN_LAYOUTS:
        if {first, act, second} == children.keys():
            return [children[first], children[second]], children[act], False
    for first, act, second in GATED_LAYOUTS:
        if {*first, act, second} == children.keys():
            return [*(children[name] for name in first), children[second]], children[act], True
    raise ConfigError(
        f"{type(mlp).__name__} with children {sorted(children)} is not a two-layer MLP that libmoe_fast knows; "
        "give CLIPMLP, SiglipMLP, LlavaMultiModalProjector, LlamaMLP, Phi3MLP or nn.Sequential(Linear, act, Linear)"
    )


def find_norm(mlp: nn.Module) -> nn.LayerNorm | None:
    """The layer norm that an MLP begins with; that it does begin with it, forward has to show."""
    found = (getattr(mlp, name, None) for name in NORMS)
    return next((norm for norm in found if type(norm) is nn.LayerNorm and norm.bias is not None), None)


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 has cut it."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def unpartitioned(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager:
    """Inside, those that DeepSpeed ZeRO-3 has partitioned are whole. All processes enter."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def _refuse_what_a_copy_loses(mlp: nn.Module, layers: list[nn.Module], norm: nn.LayerNorm | None) -> None:
    name = type(mlp).__name__
    for layer in layers:
        if hasattr(getattr(layer, "weight", None), "full_tensor"):
            raise ConfigError(f"the weights of {name} are sharded; upcycle the model first, then call fully_shard")
        if type(layer) is not nn.Linear:
            raise ConfigError(
                f"{name} has a {type(layer).__module__}.{type(layer).__name__} where experts are copied from an "
                "nn.Linear; merge adapters (peft: model.merge_and_unload()), undo parametrizations, or load the "
                "weights unquantised (bitsandbytes: llm_int8_skip_modules, full names), then upcycle"
            )
    for module in (mlp, *layers, *([] if norm is None else [norm])):
        own = {n for n, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
        if extra := own - ({"weight", "bias"} if isinstance(module, nn.Linear | nn.LayerNorm) else set()):
            raise ConfigError(
                f"{type(module).__name__} of {name} holds {', '.join(sorted(extra))}, which experts would lose; "
                "make it plain weights first (torch.nn.utils.prune.remove, remove_weight_norm)"
            )
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            raise ConfigError(
                f"{type(module).__name__} of {name} has hooks or a replaced forward, which experts would lose; "
                "remove them (accelerate: remove_hook_from_submodules), upcycle, then set them again"
            )


@torch.no_grad()
def _compare_with_forward(mlp: nn.Module, parts: DenseParts) -> None:
    """Names of children do not say what forward does with them, its values on a few tokens do."""
    weight = parts.w1
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    training = mlp.training
    with torch.autocast(weight.device.type, enabled=False):
        z = F.linear(x if parts.norm is None else parts.norm(x), parts.w1, parts.b1)
        act = ACTIVATIONS[parts.activation]
        gate, up = z.chunk(2, dim=-1) if parts.gated else (z, 1)
        expected = F.linear(act(gate) * up, parts.w2, parts.b2)
        try:
            actual = mlp.eval()(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{type(mlp).__name__} does not map tokens [.., D] to tokens: {error}") from error
        finally:
            mlp.train(training)
    # Both round alike; what is left is the order of sums, and an activation's other formula.
    tolerance = max(8 * torch.finfo(weight.dtype).eps, 1e-3) * expected.nan_to_num().abs().max().item()
    same = isinstance(actual, Tensor) and actual.shape == expected.shape
    if not (same and torch.allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=True)):
        raise ConfigError(
            f"{type(mlp).__name__} computes something else than linear, {parts.activation}, linear of its weights; "
            "experts copied from it would not equal it"
        )


def activation_name(act: nn.Module) -> str:
    """Recognises an activation by what it computes: class names differ between versions, functions do not. Far enough
    out to see a limit."""
    probe = torch.linspace(-12, 12, 97, dtype=torch.float64, device="cpu")
    value = act(probe)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(value, function(probe), rtol=0, atol=1e-9):
            return name
    raise ConfigError(
        f"activation {type(act).__name__} computes none of the supported functions: {', '.join(ACTIVATIONS)}"
    )
