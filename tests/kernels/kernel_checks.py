"""What the kernels are compared with: the same mathematics in PyTorch, in float64 (the truth) and in their precision.

`check_dispatch` and `check_experts` run one case forward and backward. They take the kernels' modules as an argument,
so that test_mutations.py can give them broken ones. Every test file of this folder imports this one, and is skipped
where kernels cannot run.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from libmoe_fast import losses, ops, reference
from libmoe_fast.spec import RouterSpec

if reason := ops.available_backends()["triton"]:
    pytest.skip(f"Triton kernels cannot run in this process: {reason}", allow_module_level=True)

DEVICE = "cpu" if ops.interpreted() else "cuda"
BALANCE_COEF, Z_COEF = 0.3, 0.2  # large, so that the losses' gradients are seen beside the others


class Kernels(NamedTuple):
    """The two modules that launch kernels."""

    dispatch: Any
    experts: Any


def load_kernels(package: str = "libmoe_fast.kernels") -> Kernels:
    return Kernels(import_module(f"{package}.dispatch"), import_module(f"{package}.experts"))


def assert_as_accurate(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error against `exact` at most twice that of `theirs`, plus float32 noise; where the truth is zero, zero."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((v[name].double() - truth).norm() for v in (ours, theirs))
        noise = FLOAT32_NOISE * truth.norm()
        assert error <= 2 * allowed + noise, f"{name}: {error:.2e}, PyTorch's own {allowed:.2e}, of {truth.norm():.2e}"


# A sum of few numbers can be exact in PyTorch by luck, and twice nothing is nothing.
FLOAT32_NOISE = 4 * torch.finfo(torch.float32).eps


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A copy to differentiate by."""
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Drawn on the CPU: the same numbers on every device."""
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def sorted_choices(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, inverse, offsets of a stable sort by expert."""
    flat = index.flatten().cpu()
    order = flat.argsort(stable=True)
    offsets = F.pad(flat.bincount(minlength=num_experts).cumsum(0), (1, 0))
    return order.to(index.device), order.argsort().to(index.device), offsets.to(index.device)


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


@dataclass(frozen=True, kw_only=True)
class DispatchCase:
    """A spec's routing of `tokens` in `sequences`, and its losses. `router` holds RouterSpec's fields."""

    router: dict = field(default_factory=dict)
    N: int = 6
    K: int = 3
    tokens: int = 40
    sequences: int = 2
    D: int = 24
    dtype: torch.dtype = torch.float32
    router_dtype: torch.dtype | None = None  # None: that of the tokens
    temperature: float = 0.7
    learn_temperature: bool = False
    over: str = "top1"

    @property
    def spec(self) -> RouterSpec:
        return RouterSpec(num_experts=self.N, top_k=self.K, **self.router)


class DispatchData(NamedTuple):
    """Inputs of a case, and the gradients that arrive."""

    x: Tensor
    w: Tensor
    bias: Tensor | None
    noise: Tensor | None
    noise_w: Tensor | None
    temperature: Tensor | None
    dweights: Tensor
    dxs: Tensor
    daux: Tensor
    aux_scale: Tensor


def dispatch_data(case: DispatchCase) -> DispatchData:
    torch.manual_seed(0)
    spec, kind = case.spec, case.router_dtype or case.dtype
    data = DispatchData(
        x=normal(case.tokens, case.D, dtype=case.dtype),
        w=normal(case.N, case.D, dtype=kind, scale=case.D**-0.5),
        bias=None if spec.bias == "none" else normal(case.N, dtype=kind),
        noise=None if spec.noise == "off" else normal(case.tokens, case.N),
        noise_w=normal(case.N, case.D, dtype=kind, scale=case.D**-0.5) if spec.noise == "learned" else None,
        temperature=torch.tensor(case.temperature, device=DEVICE) if case.learn_temperature else None,
        dweights=normal(case.tokens, case.K),
        dxs=normal(case.tokens * case.K, case.D, dtype=case.dtype),
        daux=torch.tensor([0.5, 0.0, 0.0], device=DEVICE),  # of the losses; kernels read the first
        aux_scale=torch.tensor(1.5, device=DEVICE),
    )
    return without_near_ties(case, data)


def without_near_ties(case: DispatchCase, data: DispatchData) -> DispatchData:
    """Tokens whose choice hangs on less than 1e-4 give way to copies of others: rounding may then not change it."""
    exact = [None if t is None else t.double() for t in data[:6]]
    x, w, bias, noise, noise_w, temperature = exact
    temperature = case.temperature if temperature is None else temperature
    options = {"temperature": temperature, "noise": noise, "noise_weight": noise_w}
    selection = reference.route(x, w, bias, spec=case.spec, **options).probs
    if case.spec.bias == "selection":
        selection = selection + bias
    best = selection.sort(-1, descending=True).values[:, : case.K + 1]
    clear = (-best.diff() > 1e-4 * best[:, :-1].abs()).all(-1).nonzero().flatten()
    assert len(clear) > 0
    rows = torch.arange(case.tokens, device=DEVICE)
    rows = torch.where(torch.isin(rows, clear), rows, clear[rows % len(clear)])
    return data._replace(x=data.x[rows], noise=None if data.noise is None else data.noise[rows])


def torch_dispatch(case: DispatchCase, data: DispatchData, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """reference.route, the losses and autograd, with the inputs in `dtype` (None: as they are)."""
    spec = case.spec
    x, w, bias, noise_w, temperature = (
        leaf(t, dtype) for t in (data.x, data.w, data.bias, data.noise_w, data.temperature)
    )
    routing = reference.route(
        x,
        w,
        bias,
        spec=spec,
        temperature=case.temperature if temperature is None else temperature,
        noise=data.noise,
        noise_weight=noise_w,
    )
    balance = losses.balance_loss(routing.probs, routing.index, sequences=case.sequences, over=case.over)
    z = losses.z_loss(routing.logits)
    aux = BALANCE_COEF * balance + Z_COEF * z
    order, _, offsets = sorted_choices(routing.index, case.N)
    objective = (routing.weights * data.dweights).sum() + (data.daux[0] + data.aux_scale) * aux
    objective = objective + (x[order // case.K] * data.dxs).sum()  # the experts' gradient of their rows
    learned = {"dx": x, "dw": w, "dbias": bias, "dnoise_w": noise_w, "dtemperature": temperature}
    learned = {name: t for name, t in learned.items() if t is not None}
    # a selection bias that only chooses has no gradient, which is zero
    grads = torch.autograd.grad(objective, list(learned.values()), allow_unused=True, materialize_grads=True)
    return {
        "index": routing.index,
        "weights": routing.weights.detach(),
        "probs": routing.probs.detach(),
        "logits": routing.logits.detach(),
        "losses": torch.stack([aux, balance, z]).detach(),
        "share": (offsets.diff() / offsets[-1]).to(routing.weights.dtype),
        **dict(zip(learned, grads, strict=True)),
    }


def run_dispatch(kernels: Kernels, case: DispatchCase, data: DispatchData) -> dict[str, Tensor]:
    """The kernels, forward and backward; the permutation as well."""
    spec = case.spec
    inputs = kernels.dispatch.RouterInputs(data.x, data.w, data.bias, data.noise, data.noise_w, data.temperature)
    temperature = 1.0 if case.learn_temperature else case.temperature
    coefs = {"balance_coef": BALANCE_COEF, "z_coef": Z_COEF}
    routed, permuted, values = kernels.dispatch.dispatch(
        inputs, spec=spec, temperature=temperature, sequences=case.sequences, over_topk=case.over == "topk", **coefs
    )
    grads = kernels.dispatch.dispatch_backward(
        inputs,
        routed,
        permuted.inverse,
        values.first_share,
        dweights=data.dweights,
        daux=data.daux,
        aux_scale=data.aux_scale,
        dxs=data.dxs,
        spec=spec,
        temperature=temperature,
        **coefs,
    )
    return {
        **{name: getattr(routed, name) for name in ("index", "weights", "probs", "logits")},
        **permuted._asdict(),
        "losses": values.losses,
        "share": values.share,
        **{name: g for name, g in grads._asdict().items() if g is not None},
    }


def check_dispatch(kernels: Kernels, case: DispatchCase) -> None:
    """Choices and permutation exactly; gate weights, losses and every gradient as accurately as PyTorch."""
    data = dispatch_data(case)
    ours = run_dispatch(kernels, case, data)
    theirs, exact = torch_dispatch(case, data, None), torch_dispatch(case, data, torch.float64)
    for result in (ours, theirs):  # no case has a tie that rounding could break
        assert torch.equal(result.pop("index"), exact["index"])
    order, inverse, offsets = sorted_choices(exact.pop("index"), case.N)
    assert torch.equal(ours.pop("order"), order)
    assert torch.equal(ours.pop("inverse"), inverse)
    assert torch.equal(ours.pop("offsets"), offsets)
    assert_as_accurate(ours, theirs, exact)


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@dataclass(frozen=True, kw_only=True)
class ExpertCase:
    """T tokens through K of N experts. load: how the choices spread over the experts."""

    T: int = 50
    D: int = 24
    H: int = 40
    O: int = 20
    N: int = 6
    K: int = 3
    activation: str = "gelu"
    gated: bool = False
    bias: tuple[bool, bool] = (True, True)
    dtype: torch.dtype = torch.float32
    load: str = "random"  # "random", "some idle" (odd experts get nothing) or "one takes all" (K = 1)


class ExpertData(NamedTuple):
    x: Tensor
    weights: Tensor
    index: Tensor
    dy: Tensor
    params: tuple[Tensor | None, ...]  # w1, b1, w2, b2


def expert_data(case: ExpertCase) -> ExpertData:
    torch.manual_seed(0)
    H1 = case.H * (2 if case.gated else 1)
    score = torch.rand(case.T, case.N)
    if case.load == "some idle":
        score[:, 1::2] = -1
    elif case.load == "one takes all":
        score[:, case.N // 2] = 2
    return ExpertData(
        x=normal(case.T, case.D, dtype=case.dtype),
        weights=torch.rand(case.T, case.K).to(DEVICE),
        index=score.argsort(-1, descending=True)[:, : case.K].contiguous().to(DEVICE),
        dy=normal(case.T, case.O, dtype=case.dtype),
        params=(
            normal(case.N, H1, case.D, dtype=case.dtype, scale=case.D**-0.5),
            normal(case.N, H1, dtype=case.dtype) if case.bias[0] else None,
            normal(case.N, case.O, case.H, dtype=case.dtype, scale=case.H**-0.5),
            normal(case.N, case.O, dtype=case.dtype) if case.bias[1] else None,
        ),
    )


PARAMETER_GRADS = ("dw1", "db1", "dw2", "db2")


def torch_experts(case: ExpertCase, data: ExpertData, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A loop over experts in F.linear and autograd, as anyone would write it, in `dtype` (None: as the inputs are)."""
    x, weights = leaf(data.x, dtype), leaf(data.weights, dtype and torch.float64)
    w1, b1, w2, b2 = params = [leaf(p, dtype) for p in data.params]
    y = x.new_zeros(case.T, case.O)
    for e in range(case.N):
        t, k = torch.where(data.index == e)
        z = F.linear(x[t], w1[e], None if b1 is None else b1[e])
        out = F.linear(reference.activate(z, case.activation, case.gated), w2[e], None if b2 is None else b2[e])
        y = y.index_add(0, t, out * weights[t, k, None].to(x.dtype))
    learned = {"dx": x, "dweights": weights, **dict(zip(PARAMETER_GRADS, params, strict=True))}
    learned = {name: t for name, t in learned.items() if t is not None}
    grads = torch.autograd.grad(y, list(learned.values()), data.dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(learned, grads, strict=True))}


def run_experts(
    kernels: Kernels, case: ExpertCase, data: ExpertData, *, weight_grads: bool = True
) -> dict[str, Tensor]:
    """The kernels, forward and backward, after the permutation of an index that they did not make."""
    experts, permuted = kernels.experts, kernels.dispatch.permute(data.index, case.N)
    expert = experts.ExpertWeights(*data.params, case.activation, case.gated)
    y, z = experts.experts(data.x, data.weights, permuted, expert, store_z=True)
    grads = experts.experts_backward(data.dy, data.x, data.weights, permuted, expert, z, weight_grads=weight_grads)
    dx = experts.combine(grads.dxs, permuted.inverse, case.K)
    return {"y": y, "dx": dx, **{name: g for name, g in grads._asdict().items() if name != "dxs" and g is not None}}


def check_experts(kernels: Kernels, case: ExpertCase) -> None:
    """y and every gradient as accurately as PyTorch."""
    data = expert_data(case)
    ours = run_experts(kernels, case, data)
    assert_as_accurate(ours, torch_experts(case, data, None), torch_experts(case, data, torch.float64))
