"""What fused routing is compared with: reference.route, the losses and autograd, in float64 (the truth) and in their
precision. Used by the tests of the CPU ops and, in kernels/, of the Triton kernels.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from libmoe_fast import losses, reference
from libmoe_fast.spec import RouterSpec

BALANCE_COEF, Z_COEF = 0.3, 0.2  # large, so that the losses' gradients are seen beside the others

# The specs of the built-in routers and of each of their options that fused routing sees.
BUILT_IN = {
    "smoe": {},
    "smoe-gaussian": {"noise": "gaussian", "noise_std": 0.6},
    "smoe-learned-noise": {"noise": "learned"},
    "cosine": {"score": "cosine", "bias": "selection", "gate": "softmax"},
    "perturbed": {"score": "cosine", "tau": 0.1, "bias": "selection", "gate": "softmax"},
    "sigmoid-softmax": {"bias": "score", "probability": "softmax_sigmoid"},
    "sigmoid-sum": {"bias": "score", "probability": "sigmoid"},
    "sigmoid-none": {"bias": "score", "probability": "sigmoid", "gate": "none"},
    "hyper": {"bias": "score", "probability": "identity", "gate": "softmax", "aux": False},
}
# Routers that a user may register: other paths through the same code.
USER_MADE = {
    "loss-free-balancing": {"bias": "selection", "probability": "sigmoid"},  # DeepSeek-V3's
    "cosine-learned-noise": {"score": "cosine", "tau": 0.1, "noise": "learned", "gate": "none"},
    "cosine-sigmoid-score-bias": {
        "score": "cosine",
        "bias": "score",
        "probability": "softmax_sigmoid",
        "gate": "softmax",
    },
}


def assert_as_accurate(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor], *, depth: int = 1, cut: float = 0.0
) -> None:
    """Error against `exact` at most twice that of `theirs`, plus float32 noise; where the truth is zero, zero.

    depth: terms of the longest sum. Added one after the other, as our products do, with signs at random, they err by
    about eps/2 sqrt(depth / 6) of the result; a library may split the sum, and err less. Two such sums follow another.
    cut: part of the result that is lost where operands are cut, not rounded.
    """
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        assert ours[name].dtype == theirs[name].dtype, name
        error, allowed = ((v[name].double() - truth).norm() for v in (ours, theirs))
        noise = torch.finfo(torch.float32).eps * max(FLOAT32_NOISE, math.sqrt(depth / 6)) * truth.norm()
        said = f"{name}: {error:.2e}, PyTorch's own {allowed:.2e}, of {truth.norm():.2e}"
        assert error <= 2 * allowed + noise + cut * truth.norm(), said


# A sum of few numbers can be exact in PyTorch by luck, and twice nothing is nothing.
FLOAT32_NOISE = 4  # eps


def leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A copy to differentiate by."""
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def random_normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, device: str = "cpu") -> Tensor:
    """Drawn on the CPU: the same numbers on every device."""
    return (torch.randn(shape) * scale).to(device, dtype)


def sorted_choices(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, inverse, offsets of a stable sort by expert."""
    flat = index.flatten().cpu()
    order = flat.argsort(stable=True)
    offsets = F.pad(flat.bincount(minlength=num_experts).cumsum(0), (1, 0))
    return order.to(index.device), order.argsort().to(index.device), offsets.to(index.device)


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
    dlosses: Tensor
    aux_scale: Tensor


def dispatch_data(case: DispatchCase, device: str = "cpu") -> DispatchData:
    torch.manual_seed(0)
    normal = functools.partial(random_normal, device=device)
    spec, kind = case.spec, case.router_dtype or case.dtype
    data = DispatchData(
        x=normal(case.tokens, case.D, dtype=case.dtype),
        w=normal(case.N, case.D, dtype=kind, scale=case.D**-0.5),
        bias=None if spec.bias == "none" else normal(case.N, dtype=kind),
        noise=None if spec.noise == "off" else normal(case.tokens, case.N),
        noise_w=normal(case.N, case.D, dtype=kind, scale=case.D**-0.5) if spec.noise == "learned" else None,
        temperature=torch.tensor(case.temperature, device=device) if case.learn_temperature else None,
        dweights=normal(case.tokens, case.K),
        dxs=normal(case.tokens * case.K, case.D, dtype=case.dtype),
        dlosses=torch.tensor([0.5, 0.4, -0.3], device=device),  # of the aux, balance and z loss
        aux_scale=torch.tensor(1.5, device=device),
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
    rows = torch.arange(case.tokens, device=data.x.device)
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
    values = torch.stack([aux, balance, z])
    objective = (routing.weights * data.dweights).sum() + (values * data.dlosses).sum() + data.aux_scale * aux
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
        "losses": values.detach(),
        "share": offsets.diff().to(routing.weights.dtype) / offsets[-1],
        **dict(zip(learned, grads, strict=True)),
    }


def compare_dispatch(case: DispatchCase, data: DispatchData, ours: dict[str, Tensor]) -> None:
    """Choices and permutation exactly; gate weights, losses and every gradient as accurately as PyTorch."""
    ours = dict(ours)
    theirs, exact = torch_dispatch(case, data, None), torch_dispatch(case, data, torch.float64)
    for result in (ours, theirs):  # no case has a tie that rounding could break
        assert torch.equal(result.pop("index"), exact["index"])
    order, inverse, offsets = sorted_choices(exact.pop("index"), case.N)
    assert torch.equal(ours.pop("order"), order)
    assert torch.equal(ours.pop("inverse"), inverse)
    assert torch.equal(ours.pop("offsets"), offsets)
    assert_as_accurate(ours, theirs, exact, depth=max(case.D, case.tokens))


MISSING = ("dlosses", "aux_scale", "both", "dxs")  # gradients that are None in some mode


def check_missing(run: Callable[[DispatchData], dict[str, Tensor]], data: DispatchData, missing: str) -> None:
    """None is the same as zeros: the loss returned or attached, evaluation, experts that ran on other rows."""
    absent = ("dlosses", "aux_scale") if missing == "both" else (missing,)
    zeros = data._replace(**{name: torch.zeros_like(getattr(data, name)) for name in absent})
    without = run(data._replace(**dict.fromkeys(absent)))
    for name, value in run(zeros).items():
        assert torch.equal(value, without[name]), name
