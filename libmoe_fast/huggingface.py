"""Our experts in the MoE models of Hugging Face transformers: experts_implementation="libmoe_fast".

    libmoe_fast.register_transformers()
    model = AutoModelForCausalLM.from_pretrained("allenai/OLMoE-1B-7B-0924", experts_implementation="libmoe_fast")
    model.set_experts_implementation("libmoe_fast")  # or later, and back to "grouped_mm" or "eager" at any time

Only the experts change: the model keeps its router, its parameters and its checkpoints. transformers stacks expert
weights as we do, so that in all but two layouts (see `stacked_weights`) nothing is copied. What the kernels do not
compute is a ConfigError, never another implementation. Importing this module does not import transformers.
"""

import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from packaging.version import Version
from torch import Tensor, nn

from libmoe_fast import ops
from libmoe_fast.compatibility import installed_version
from libmoe_fast.errors import BackendError, ConfigError
from libmoe_fast.layer import autocast_dtype, autocast_off
from libmoe_fast.reference import ACTIVATIONS, accumulation_dtype, activate
from libmoe_fast.spec import Routing

NAME = "libmoe_fast"
TRANSFORMERS_FLOOR = Version("5.7")
NO_TRANSFORMERS = f"transformers {TRANSFORMERS_FLOOR} or newer, whose experts interface takes ours, is not usable here \
({{reason}}); pip install 'transformers>={TRANSFORMERS_FLOOR}'"

# What transformers' decorator says of an experts class, and what holds where its version does not say it yet.
TRAITS = {
    "has_gate": True,
    "has_bias": False,
    "is_concatenated": True,
    "is_transposed": False,
    "has_post_expert_norm": False,
    "_is_expert_parallel": True,  # choices may be sentinels
}
PARAMETERS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
INSTEAD = 'run this model with experts_implementation="grouped_mm" or "eager"'


def register_transformers() -> None:
    """Makes `experts_implementation="libmoe_fast"` known to transformers. Calling it again changes nothing.

    The backend is chosen per call as for every layer (see ops.py): LIBMOE_FAST_BACKEND, else the fastest for the
    device. Raises BackendError where transformers is missing, or older than 5.7: 5.0 brought the experts interface, but
    refuses implementations that are not its own.
    """
    found = installed_version("transformers")
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise BackendError(NO_TRANSFORMERS.format(reason=error)) from error
    if Version(found or "0") < TRANSFORMERS_FLOOR:
        raise BackendError(NO_TRANSFORMERS.format(reason=f"found {found}"))
    torch.compiler.assume_constant_result(recognise)  # here, not as a decorator: it imports torch's whole compiler
    ExpertsInterface.register(NAME, experts_forward)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of a transformers experts module: hidden_states [T, D] -> [T, D] in the same dtype.

    module: of a class that `transformers.integrations.use_experts_implementation` decorates; see `stacked_weights`.
    top_k_index, top_k_weights [T, K]: the choices of the model's own router, weights of any floating dtype. Under
    expert parallelism index N, a choice that another rank computes, adds nothing and costs nothing.

    Raises ConfigError for experts that compute something else than act(.) with act one of reference.ACTIVATIONS, plain
    or gated, and for tokens whose dtype is not that of the weights (outside torch.autocast).
    """
    activation = recognise(module)
    autocast = autocast_dtype(hidden_states)
    dtype = autocast or hidden_states.dtype
    with autocast_off(hidden_states):
        tensors = stacked_weights(module)
        w1 = tensors[0]
        if autocast is not None:
            tensors = tuple(None if t is None else t.to(dtype) for t in tensors)
        elif w1.dtype != dtype:
            raise ConfigError(
                f"tokens are {dtype}, but the weights of {type(module).__name__} are {w1.dtype}; "
                "cast one of them, or run under torch.autocast; quantized weights are not supported"
            )
        index, weights = top_k_index.long(), top_k_weights.to(accumulation_dtype(dtype))  # [T, K]
        y = ops.experts(
            hidden_states.to(dtype),
            Routing(index, weights, free=int(trait(module, "_is_expert_parallel"))),
            *tensors,
            activation=activation,
            gated=trait(module, "has_gate"),
        )
    return y.to(hidden_states.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def trait(module: nn.Module, name: str) -> bool:
    return getattr(module, name, TRAITS[name])


def stacked_weights(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1 [N, 2H, D] (gate rows, then up rows; not gated [N, H, D]), b1, w2 [N, D, H], b2 of a transformers module.

    Its usual layout is ours: the very parameters come back. Transposed ones come back as views, which the triton
    backend copies on each call, and interleaved gate and up rows as a copy.
    """
    gated = trait(module, "has_gate")
    first = "gate_up_proj" if gated else "up_proj"
    w1, w2 = getattr(module, first), module.down_proj
    b1 = b2 = None
    if trait(module, "is_transposed"):
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    if trait(module, "has_bias"):
        b1, b2 = getattr(module, f"{first}_bias"), module.down_proj_bias
    if gated and not trait(module, "is_concatenated"):
        w1, b1 = (None if t is None else deinterleave(t) for t in (w1, b1))
    return w1, b1, w2, b2


def deinterleave(rows: Tensor) -> Tensor:
    """[N, 2H, ...] with rows gate 0, up 0, gate 1, up 1, .. -> all gate rows, then all up rows."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# What a module computes

# module -> (its act_fn, the name of what it computes)
_recognised: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def recognise(module: nn.Module) -> str:
    """The name of a module's activation, found once per act_fn; a constant to torch.compile (register_transformers).

    Raises ConfigError for other experts than ours.
    """
    act = getattr(module, "act_fn", None)  # some gates have none
    known = _recognised.get(module)
    if known is None or known[0] is not act:
        check_supported(module)
        with ThreadPoolExecutor(1) as thread:  # of its own: the modes of torch.export and fake tensors are per thread
            known = _recognised[module] = act, thread.submit(recognise_activation, module).result()
    return known[1]


def check_supported(module: nn.Module) -> None:
    """Raises ConfigError for experts with more to them than two layers and an activation."""
    name = type(module).__name__
    if trait(module, "has_post_expert_norm"):
        raise ConfigError(f"{name} normalizes each expert's output, for which libmoe_fast has no kernel; {INSTEAD}")
    parametrized = "parametrizations."  # torch's own: the attribute holds what they compute
    names = (key for key, _ in module.named_parameters() if not key.startswith(parametrized))
    if unknown := sorted(set(names) - PARAMETERS):
        raise ConfigError(f"{name} has parameters that libmoe_fast would leave out: {', '.join(unknown)}; {INSTEAD}")


def recognise_activation(module: nn.Module) -> str:
    """Recognises act(gate) * up, or act(.), by what it computes: modules override names, limits and layouts.

    The probe reaches far enough to see a clamp. It runs where the weights are, since activations too may be kernels.
    """
    device = "cpu" if module.down_proj.is_meta else module.down_proj.device
    near, far = torch.linspace(-6, 6, 48, device=device), torch.logspace(1, 6, 6, device=device)
    gate = torch.cat((near, far, -far))  # [P]
    up = torch.tensor([-1e6, -1e3, -10, -1, 0.5, 1, 10, 1e3, 1e6], device=device).unsqueeze(1)  # [S, 1]
    if trait(module, "has_gate"):
        halves = gate.expand(len(up), -1), up.expand(-1, len(gate))  # [S, P] each
        joined = torch.cat(halves, 1)  # [S, 2P]
        given = joined if trait(module, "is_concatenated") else torch.stack(halves, 2).flatten(1)
        value, scale = module._apply_gate(given), (1 + gate.abs()) * (1 + up.abs())
    else:
        joined, scale = gate, 1 + gate.abs()
        value = module.act_fn(gate)
    for name in ACTIVATIONS:
        expected = activate(joined, name, trait(module, "has_gate"))
        if bool(((value - expected).abs() <= 1e-5 * scale).all()):
            return name
    formula = "act(gate) * up" if trait(module, "has_gate") else "act(x)"
    raise ConfigError(
        f"{type(module).__name__} does not compute {formula} with an activation that libmoe_fast has kernels for: "
        f"{', '.join(ACTIVATIONS)}; {INSTEAD}"
    )
