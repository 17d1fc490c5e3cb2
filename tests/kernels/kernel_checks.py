"""What the kernels are compared with: the same mathematics in PyTorch, in float64 (the truth) and in their precision.

`check_dispatch` and `check_experts` run one case forward and backward. They take the kernels' modules as an argument,
so that test_mutations.py can give them broken ones. Every test file of this folder imports this one, and is skipped
where kernels cannot run.
"""

import functools
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import dispatch_checks
import pytest
import torch
import torch.nn.functional as F
from dispatch_checks import (
    BALANCE_COEF,
    Z_COEF,
    DispatchCase,
    DispatchData,
    assert_as_accurate,
    compare_dispatch,
    leaf,
    random_normal,
)
from torch import Tensor

from libmoe_fast import fused, ops, reference
from libmoe_fast.spec import Dispatch

if reason := ops.available_backends()["triton"]:
    pytest.skip(f"Triton kernels cannot run in this process: {reason}", allow_module_level=True)

DEVICE = "cpu" if ops.interpreted() else "cuda"
normal = functools.partial(random_normal, device=DEVICE)
dispatch_data = functools.partial(dispatch_checks.dispatch_data, device=DEVICE)


class Kernels(NamedTuple):
    """The two modules that launch kernels."""

    dispatch: Any
    experts: Any


def load_kernels(package: str = "libmoe_fast.kernels") -> Kernels:
    return Kernels(import_module(f"{package}.dispatch"), import_module(f"{package}.experts"))


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


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
        dlosses=data.dlosses,
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
    data = dispatch_data(case)
    compare_dispatch(case, data, run_dispatch(kernels, case, data))


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
    # "random", "some idle" (odd experts get nothing), "one takes all" (K = 1), "some free" or "all free" (choices are
    # of two slots that no expert runs)
    load: str = "random"
    counted: bool = False  # whether the dispatch has rows for those alone that an expert runs
    far: bool = False  # pre-activations about -12, 0 and 12: none where gpt_oss has its kinks, at 7

    @property
    def free(self) -> int:
        return 2 if self.load.endswith("free") else 0

    @property
    def depth(self) -> int:
        """Terms of the longest sum: over features, or an expert's rows."""
        return max(self.D, self.H * (2 if self.gated else 1), self.O, self.T * self.K)


# Four row tiles of one expert: in the interpreter, the last of them is left to three programs, 2, 2 and 1 of its steps.
LAST_ROUND = {"T": 200, "N": 4, "K": 1, "H": 260, "load": "one takes all"}


class ExpertData(NamedTuple):
    x: Tensor
    weights: Tensor
    index: Tensor
    dy: Tensor
    params: tuple[Tensor | None, ...]  # w1, b1, w2, b2


def _first_bias(case: ExpertCase, width: int) -> Tensor | None:
    if case.far:
        return (12 * torch.randint(-1, 2, (case.N, width))).to(DEVICE, case.dtype)
    return normal(case.N, width, dtype=case.dtype) if case.bias[0] else None


def expert_data(case: ExpertCase) -> ExpertData:
    torch.manual_seed(0)
    H1 = case.H * (2 if case.gated else 1)
    score = torch.rand(case.T, case.N + case.free)
    if case.load == "some idle":
        score[:, 1::2] = -1
    elif case.load == "one takes all":
        score[:, case.N // 2] = 2
    elif case.load == "all free":
        score[:, case.N :] = 2
    return ExpertData(
        x=normal(case.T, case.D, dtype=case.dtype),
        weights=torch.rand(case.T, case.K).to(DEVICE),
        index=score.argsort(-1, descending=True)[:, : case.K].contiguous().to(DEVICE),
        dy=normal(case.T, case.O, dtype=case.dtype),
        params=(
            normal(case.N, H1, case.D, dtype=case.dtype, scale=case.D**-0.5),
            _first_bias(case, H1),
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
    experts, permuted = kernels.experts, kernels.dispatch.permute(data.index, case.N + case.free)
    if case.counted:
        permuted = kernels.dispatch.Permuted(*fused.counted(Dispatch(*permuted), case.N)[:3])
        assert permuted.order.shape[0] == (data.index < case.N).sum() + 1
    expert = experts.ExpertWeights(*data.params, case.activation, case.gated)
    y, z = experts.experts(data.x, data.weights, permuted, expert, store_z=True)
    grads = experts.experts_backward(data.dy, data.x, data.weights, permuted, expert, z, weight_grads=weight_grads)
    dx = experts.combine(grads.dxs, permuted.inverse, case.K)
    return {"y": y, "dx": dx, **{name: g for name, g in grads._asdict().items() if name != "dxs" and g is not None}}


def check_experts(kernels: Kernels, case: ExpertCase) -> None:
    """y and every gradient as accurately as PyTorch."""
    data = expert_data(case)
    ours = run_experts(kernels, case, data)
    exact = torch_experts(case, data, torch.float64)
    assert_as_accurate(ours, torch_experts(case, data, None), exact, depth=case.depth)
