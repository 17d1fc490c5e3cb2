"""What a subject puts together for a case: who takes part, against which limit, and who had to stay away and why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn

from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.limits import copy_of, dense_gemms
from libmoe_fast.benchmarks.measure import Entrant
from libmoe_fast.benchmarks.peers import PEERS, add_peer, why_not
from libmoe_fast.errors import BackendError
from libmoe_fast.layer import MoE
from libmoe_fast.upcycle import moe_layers

OURS = "ours"
COPY = "memory copy"  # takes part beside the peers, as the second limit
LOOP = "loop"
SEED = 0


class Arena(NamedTuple):
    """Who takes part in a case.

    entrants     ours first, or alone where no peer can run
    limit_name   what the limit computes; `make_limit` builds it, so that measuring memory need not
    skipped      who cannot take part -> why
    """

    entrants: dict[str, Entrant]
    limit_name: str
    make_limit: Callable[[], Callable[[], object]]
    skipped: dict[str, str]


def build_arena(case: Case, device: torch.device) -> Arena:
    """With the same random weights and tokens every time. Raises BackendError where ours cannot run."""
    torch.manual_seed(SEED)
    return import_module(f"libmoe_fast.benchmarks.bench_{case.subject}").build(case, device)


def peers_for(case: Case) -> tuple[list[str], dict[str, str]]:
    """(peers that can run this case, reasons of those that cannot)."""
    names = PEERS if case.peers is None else case.peers
    reasons = {name: why_not(name, case) for name in names}
    return [n for n in names if reasons[n] is None], {n: r for n, r in reasons.items() if r is not None}


def random_tokens(case: Case, device: torch.device, *, features: int) -> Tensor:
    return torch.randn(case.tokens, features, device=device).to(case.torch_dtype)


def make_moe(case: Case, device: torch.device, **options) -> MoE:
    shape = case.shape
    return MoE(
        shape.in_features,
        shape.hidden_features,
        shape.out_features,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        router=case.router,
        activation=shape.activation,
        gated=shape.gated,
        bias=shape.bias,
        device=device,
        dtype=case.torch_dtype,
        **options,
    )


def entrant(
    case: Case, call: Callable[[], Tensor], *, module: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor
) -> Entrant:
    """`call` in the case's mode: under no_grad, with autograd, or followed by backward from `grad`."""
    module.train(case.mode != "inference")
    leaves = [t for t in (*inputs, *module.parameters()) if t.requires_grad]

    layers = moe_layers(module).values()

    def reset() -> None:
        for leaf in leaves:
            leaf.grad = None
        for layer in layers:
            layer.clear_statistics()

    def inference() -> None:
        with torch.no_grad():
            call()

    def forward() -> None:
        call()

    def both() -> None:
        call().backward(grad)

    run = {"inference": inference, "fwd": forward, "fwd+bwd": both}[case.mode]
    return Entrant(run, reset, tuple(module.parameters()))


def beside_peers(
    case: Case, moe: MoE, *, part: Callable[[nn.Module], nn.Module], arguments: tuple, inputs: tuple[Tensor, ...]
) -> Arena:
    """Ours and the case's peers, each called as `part(layer)(*arguments)`, against dense GEMMs and a memory copy."""
    names, skipped = peers_for(case)
    device = moe.experts.w1.device
    grad = random_tokens(case, device, features=case.shape.out_features)
    layers = {OURS: moe} | {name: add_peer(moe, name) for name in names}
    modules = {name: part(layer) for name, layer in layers.items()}
    entrants = {
        name: entrant(case, partial(module, *arguments), module=module, inputs=inputs, grad=grad)
        for name, module in modules.items()
    }
    if case.peers is None:
        entrants[COPY] = Entrant(copy_of(experts_traffic(case), device))
    return Arena(entrants, "dense GEMM", partial(dense_gemms, case, device), skipped)


def experts_traffic(case: Case) -> int:
    """Bytes that the experts must move at least: weights, x and y once; with backward, both again, their gradients,
    and the pre-activation [T*K, H] there and back."""
    shape = case.shape
    x, y = case.tokens * shape.in_features, case.tokens * shape.out_features
    z = case.tokens * shape.top_k * shape.hidden_features * (2 if shape.gated else 1)
    item = case.torch_dtype.itemsize
    once = case.experts_bytes() + (x + y) * item
    return 3 * once + 2 * z * item if case.mode == "fwd+bwd" else once


def without_extension(device: torch.device) -> str | None:
    """Why the token permutation ops cannot run on `device`; None if they can."""
    from libmoe_fast.extension import load

    state = load()
    if not state.loaded:
        return f"{state.reason}; {state.hint}"
    key = {"cpu": "CPU", "cuda": "CUDA"}[device.type]
    if not torch._C._dispatch_has_kernel_for_dispatch_key("libmoe_fast::permute_index", key):
        return f"the C++ extension has no {key} kernels; on GPUs the triton backend permutes inside its own kernels"
    return None


def require(reason: str | None) -> None:
    """Raises BackendError with the reason why ours cannot run a case, if there is one."""
    if reason:
        raise BackendError(reason)
