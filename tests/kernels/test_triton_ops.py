"""torch.library.opcheck of every op of the triton backend: schema, fakes, autograd, and tracing with dynamic shapes."""

import pytest
import torch
from kernel_checks import DEVICE, normal
from torch.library import opcheck

from libmoe_fast import fused, triton_backend
from libmoe_fast.routers import build_router

T, D, H, O, N, K = 10, 24, 40, 16, 3, 2


def dispatch_arguments(name: str, options: dict, *, attach: bool = True) -> tuple:
    torch.manual_seed(0)
    router = build_router(name, D, N, K, **options).to(DEVICE)
    spec = router.spec
    weight, bias = router.hypernet(router.embedding) if name == "hyper" else (router.weight, router.bias)
    return (
        normal(T, D).requires_grad_(),
        weight.detach().contiguous().requires_grad_(),
        None if bias is None else bias.detach().contiguous().requires_grad_(),
        None if spec.noise == "off" else normal(T, N),
        normal(N, D).requires_grad_() if spec.noise == "learned" else None,
        torch.tensor(0.7, device=DEVICE, requires_grad=True) if options.get("learn_temperature") else None,
        torch.tensor(1.0, device=DEVICE) if attach and spec.aux else None,
        1.0,
        spec.encoded,
        2,
        False,
        0.3,
        0.2,
    )


ROUTING = [
    pytest.param("smoe", {}, id="smoe"),
    pytest.param("smoe", {"noise": "learned"}, id="learned-noise"),  # every optional tensor but these
    pytest.param("cosine", {"learn_temperature": True}, id="learned-temperature"),
    pytest.param("hyper", {}, id="hyper"),  # no auxiliary loss
]


@pytest.mark.parametrize(("name", "options"), ROUTING)
def test_dispatch(name, options, monkeypatch):
    """The rows have no values of their own; opcheck compares outputs, so here they are zeros."""
    monkeypatch.setattr(fused, "virtual_rows", lambda x, k: x.new_zeros(1).expand(x.shape[0] * k, x.shape[1]))
    opcheck(triton_backend.triton_dispatch, dispatch_arguments(name, options))


@pytest.mark.parametrize(("name", "options"), ROUTING)
def test_dispatch_backward(name, options):
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in dispatch_arguments(name, options)]
    *tensors, temperature, spec, _sequences, _over, balance_coef, z_coef = arguments
    _rows, *routed, _order, inverse, _offsets, _losses, _share, first_share = triton_backend.triton_dispatch(*arguments)
    grads = (normal(T * K, D), normal(T, K), normal(3))
    opcheck(
        triton_backend.triton_dispatch_backward,
        (*grads, *tensors, routed, inverse, first_share, temperature, spec, balance_coef, z_coef),
    )


def expert_arguments(*, bias: bool = True, through_rows: bool = True) -> list:
    torch.manual_seed(0)
    index = torch.rand(T, N).argsort(-1)[:, :K].contiguous().to(DEVICE)
    x = normal(T, D)
    return [
        x if through_rows else x.requires_grad_(),
        fused.virtual_rows(x, K).requires_grad_() if through_rows else None,
        torch.rand(T, K).to(DEVICE).requires_grad_(),
        *triton_backend.triton_permute(index, N),
        normal(N, H, D).requires_grad_(),
        normal(N, H).requires_grad_() if bias else None,
        normal(N, O, H).requires_grad_(),
        normal(N, O).requires_grad_() if bias else None,
        "gelu",
        False,
        True,
    ]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("through_rows", [True, False], ids=["rows", "no-rows"])
def test_experts(bias, through_rows):
    opcheck(triton_backend.triton_experts, tuple(expert_arguments(bias=bias, through_rows=through_rows)))


@pytest.mark.parametrize("sum_over_k", [True, False])
@pytest.mark.parametrize("weight_grads", [True, False])
def test_experts_backward(sum_over_k, weight_grads):
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in expert_arguments()]
    _, z = triton_backend.triton_experts(*arguments)
    x, _rows, *tensors, activation, gated, _ = arguments
    opcheck(
        triton_backend.triton_experts_backward,
        (normal(T, O), x, *tensors, z, activation, gated, sum_over_k, weight_grads),
    )


def test_permute():
    opcheck(triton_backend.triton_permute, (torch.randint(N, (T, K), device=DEVICE), N))
