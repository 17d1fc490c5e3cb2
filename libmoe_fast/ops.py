"""The two halves of a layer, the auxiliary loss between them, and the choice of backend.

Backends are chosen per call: the `backend` argument, else LIBMOE_FAST_BACKEND, else the fastest that works on the
tensors' device. One asked for by name that cannot work is an error, never another backend.

    reference   plain PyTorch (reference.py), anywhere
    cpu         fused routing and experts in C++ (csrc/, cpu_backend.py), on CPU tensors
    triton      the same in Triton (kernels/, triton_backend.py), on CUDA and ROCm, and in the interpreter
    megablocks  the experts as megablocks' grouped GEMMs (megablocks_backend.py), on CUDA; only where asked for
"""

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from libmoe_fast import cpu_backend, extension, fused, losses, megablocks_backend, reference
from libmoe_fast.errors import BackendError
from libmoe_fast.spec import AuxLosses, LossOptions, RouterSpec, Routing

BACKENDS = ("reference", "cpu", "triton", "megablocks")
ENVIRONMENT_VARIABLE = "LIBMOE_FAST_BACKEND"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {"triton": TRITON_DTYPES, "megablocks": megablocks_backend.DTYPES}  # the others take every one

_extension = extension.load()
extension.load_cuda()  # the same ops for CUDA tensors, where it is there; `doctor` says why where it is not
_triton_installed = importlib.util.find_spec("triton") is not None


# ---------------------------------------------------------------------------------------------------------------------
# Choice of backend


def available_backends() -> dict[str, str | None]:
    """Every backend -> None where it works here, else what is missing and how to get it."""
    return {name: _missing(name) for name in BACKENDS}


def _missing(backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if _extension.loaded else f"{_extension.reason}; {_extension.hint}"
    if not _triton_installed:
        return "triton is not installed; pip install triton"
    if backend == "megablocks":
        return megablocks_backend.missing()
    if interpreted() or torch.cuda.is_available():
        return None
    return "there is no GPU; run on one, or set TRITON_INTERPRET=1 before Python starts to debug the kernels on the CPU"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(requested: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend for tensors on `device`. Raises BackendError if the one asked for is unknown or cannot work."""
    name = requested or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is None:
        if device.type == "cpu" and _extension.loaded:
            return "cpu"
        fused = device.type == "cuda" and dtype in TRITON_DTYPES and _triton_installed
        return "triton" if fused else "reference"
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if reason := _missing(name):
        raise BackendError(f"backend {name!r} is not usable here: {reason}")
    on_cpu = name == "cpu" or (name == "triton" and interpreted())
    here = device.type if name == "reference" else "cpu" if on_cpu else "cuda"
    if device.type not in (here, "meta"):
        raise BackendError(
            f"backend {name!r} was asked for, but the tokens are on {device}; move them, or choose another"
        )
    if name in DTYPES and dtype not in DTYPES[name]:
        taken = ", ".join(str(each).removeprefix("torch.") for each in DTYPES[name])
        raise BackendError(f"backend {name!r} takes {taken}, but the tokens are {dtype}")
    return name


def fused_ops(backend: str, x: Tensor) -> fused.FusedOps | None:
    """The ops of `backend` for tokens x [T, D]; None for reference.py, which also serves no tokens on GPUs.

    For `megablocks`, which has experts only, those that route.
    """
    if backend == "reference" or (x.shape[0] == 0 and backend != "cpu"):
        return None
    if seen := transform():
        raise BackendError(f"{seen} does not go through backend {backend!r}; {INSTEAD}")
    if backend == "cpu":
        return cpu_backend.OPS
    from libmoe_fast import triton_backend

    return triton_backend.OPS


INSTEAD = """\
backend='reference' is plain PyTorch, and goes through everything: pass it to upcycle or MoE, or set \
LIBMOE_FAST_BACKEND=reference (torch.compile and torch.export take every backend)"""


def transform() -> str | None:
    """What runs this forward on tensors that stand for others, which fused ops cannot see through: an error of another
    name, or, in forward mode, derivatives that are lost without a word."""
    if torch.compiler.is_compiling():
        return None
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is not None and interpreter.key() != torch._C._functorch.TransformType.Functionalize:
        return f"torch.func ({interpreter.key().name.lower()})"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "torch.jit.trace" if torch.jit.is_tracing() else None


# ---------------------------------------------------------------------------------------------------------------------
# The two halves of a layer


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    spec: RouterSpec,
    temperature: Tensor | float = 1.0,
    noise: Tensor | None = None,
    noise_weight: Tensor | None = None,
    loss_options: LossOptions | None = None,
    backend: str | None = None,
) -> Routing:
    """Chooses experts for tokens x [T, D]; arguments and result as in `reference.route`.

    A fused backend also makes the auxiliary losses that `loss_options` asks for, and the dispatch; see `with_losses`.
    """
    options = {"spec": spec, "temperature": temperature, "noise": noise, "noise_weight": noise_weight}
    if ops := fused_ops(choose_backend(backend, x.device, x.dtype), x):
        return fused.route(ops, x, weight, bias, **options, options=loss_options)
    if x.dtype in (torch.float32, torch.float64):
        return reference.route(x, weight, bias, **options)
    return recomputed(reference.route, x, weight, bias, **options)  # else float32 copies of x would be kept


def with_losses(routing: Routing, options: LossOptions, spec: RouterSpec, *, more: Tensor | float = 0.0) -> Routing:
    """Adds the auxiliary losses to a routing that does not have them yet, attached if `options` say so.

    more: a loss of the router's own, in their total. A choice outside of the N experts is nobody's.
    """
    if routing.aux is not None:
        return routing
    hits = losses.hits(routing.index, spec.num_experts)  # [T, K, N]
    share = hits.sum((0, 1)) / hits.sum().clamp_min(1)  # [N]
    if not spec.aux:
        return routing._replace(aux=AuxLosses(None, None, None, share))
    balance = losses.balance_loss(routing.probs, routing.index, sequences=options.sequences, over=options.over)
    z = losses.z_loss(routing.logits)
    total = options.balance_coef * balance + options.z_coef * z + more
    weights = routing.weights
    if options.aux_scale is not None:
        weights = attach_aux_loss(weights, total, options.aux_scale)
    return routing._replace(weights=weights, aux=AuxLosses(total, balance, z, share))


def experts(
    x: Tensor,
    routing: Routing,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    gated: bool = False,
    counted: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Runs the chosen experts, y [T, O]; weights as in `reference.experts`. Dropless, deterministic.

    counted: of a routing most of whose choices no expert runs (Routing.free): waits for the device to count the others,
        and makes room for those alone instead of for all T*K.
    """
    options = {"activation": activation, "gated": gated}
    name = choose_backend(backend, x.device, x.dtype)
    if ops := fused_ops(name, x):
        if name == "megablocks":  # which always counts them
            return megablocks_backend.experts(ops, x, routing, w1, b1, w2, b2, **options)
        if counted:
            dispatch = fused.permuted(ops, routing, w1.shape[0])
            routing = routing._replace(dispatch=fused.counted(dispatch, w1.shape[0]))
        return fused.experts(ops, x, routing, w1, b1, w2, b2, **options)
    inputs = (x, routing.weights, routing.index, w1, b1, w2, b2)
    return recomputed(reference.experts, *inputs, **options)  # else N T H numbers and more would be kept


def recomputing() -> bool:
    """Whether this forward is activation checkpointing's, in a backward: it counts nothing again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def recomputed(function: Callable, *inputs, **options):
    """function(*inputs, **options), which keeps only its inputs for backward and runs again there."""
    if not torch.is_grad_enabled() or transform():  # torch.func has no way to keep less
        return function(*inputs, **options)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32 (float64 for float64), whatever the dtypes: routers never round on the way to a choice."""
    dtype = reference.accumulation_dtype(x.dtype)
    return F.linear(x.to(dtype), weight.to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The auxiliary loss, attached to the gate weights


@torch.library.custom_op("libmoe_fast::attach_aux_loss", mutates_args=())
def attach_aux_loss(weights: Tensor, aux_loss: Tensor, scale: Tensor) -> Tensor:
    """Returns the gate weights unchanged; backward also sends the gradient `scale` into `aux_loss`.

    So `loss.backward()` trains on loss + aux_loss, although nobody added them (the idea of Megatron's
    MoEAuxLossAutoScaler). The gate weights [T, K] are the smallest tensor that every output depends on. `scale` is
    read when backward runs, not when forward ran: it is the gradient that arrives at the loss (see upcycle.py).
    """
    return weights.clone()


@attach_aux_loss.register_fake
def _(weights, aux_loss, scale):
    return torch.empty_like(weights)


@torch.library.custom_op("libmoe_fast::aux_loss_gradient", mutates_args=())
def aux_loss_gradient(grad_weights: Tensor, scale: Tensor) -> Tensor:
    """`scale`, as an op on an incoming gradient: a compiler then cannot read it ahead of backward."""
    return scale.clone()


@aux_loss_gradient.register_fake
def _(grad_weights, scale):
    return torch.empty_like(scale)


def _attach_setup(ctx, inputs, output) -> None:
    _, aux_loss, scale = inputs
    ctx.aux_dtype = aux_loss.dtype
    ctx.save_for_backward(scale)


def _attach_backward(ctx, grad: Tensor):
    (scale,) = ctx.saved_tensors
    return grad, aux_loss_gradient(grad, scale).to(ctx.aux_dtype), None


attach_aux_loss.register_autograd(_attach_backward, setup_context=_attach_setup)
aux_loss_gradient.register_autograd(lambda ctx, _: (None, None))  # `scale` is a constant, also to a second backward
