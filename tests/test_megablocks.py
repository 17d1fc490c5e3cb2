"""The megablocks backend: its own part against a stand-in of megablocks' grouped GEMM, and all of it on a GPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from libmoe_fast import BackendError, MoE, cpu_backend, extension, megablocks_backend, ops, reference
from libmoe_fast.spec import Routing

T, K, N, D, H, O = 23, 2, 4, 10, 6, 7  # more features in than out; odd rows per expert


def grouped_gemm(a, b, batch_sizes, trans_a=False, trans_b=False):
    """What gmm of grouped_gemm computes for trans_b, by its documented signature."""
    assert (trans_a, trans_b, batch_sizes.device.type, batch_sizes.dtype) == (False, True, "cpu", torch.int64)
    parts = [rows @ weight.t() for rows, weight in zip(a.split(batch_sizes.tolist()), b, strict=True)]
    return torch.cat(parts)


@pytest.fixture
def stand_in(monkeypatch):
    module = SimpleNamespace(ops=SimpleNamespace(gmm=grouped_gemm))
    monkeypatch.setitem(sys.modules, "megablocks", SimpleNamespace(grouped_gemm_util=module))
    return module


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.skipif(not extension.load().loaded, reason="the C++ extension, which permutes here, is not built")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("idle", [True, False])  # an expert without tokens has an empty product, and zero gradients
@pytest.mark.parametrize("free", [0, 2])  # some choices are of no expert
def test_equals_the_reference(bias, gated, idle, free, stand_in):
    torch.manual_seed(0)
    x, weights = leaf(T, D), torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    index = torch.rand(T, N - idle).argsort(-1)[:, :K]
    index[::3, 0] = N + free - 1 if free else index[::3, 0]
    H1 = 2 * H if gated else H
    w1, w2 = leaf(N, H1, D), leaf(N, O, H)
    b1, b2 = (leaf(N, H1), leaf(N, O)) if bias else (None, None)
    options = {"activation": "silu", "gated": gated}
    learned = [t for t in (x, weights, w1, b1, w2, b2) if t is not None]

    y = megablocks_backend.experts(cpu_backend.OPS, x, Routing(index, weights, free=free), w1, b1, w2, b2, **options)
    expected = reference.experts(x, weights, index, w1, b1, w2, b2, **options)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads, exact = (torch.autograd.grad(out, learned, dy) for out in (y, expected))
    torch.testing.assert_close(grads, exact)


def test_what_is_missing_is_said(stand_in):
    assert torch.cuda.is_available() or "there is no GPU" in ops.available_backends()["megablocks"]
    stand_in.ops = None
    with pytest.raises(BackendError, match="without grouped_gemm; pip install"):
        megablocks_backend.grouped_gemm()


def test_only_bfloat16(monkeypatch):
    monkeypatch.setattr(ops, "_missing", lambda backend: None)
    assert ops.choose_backend("megablocks", torch.device("cuda"), torch.bfloat16) == "megablocks"
    with pytest.raises(BackendError, match=r"takes bfloat16, but the tokens are torch\.float32"):
        ops.choose_backend("megablocks", torch.device("cuda"), torch.float32)
    with pytest.raises(BackendError, match="the tokens are on cpu"):
        ops.choose_backend("megablocks", torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(megablocks_backend.missing() is not None, reason=f"megablocks: {megablocks_backend.missing()}")
def test_equals_triton_on_a_gpu():
    torch.manual_seed(0)
    moe = MoE(256, 512, 256, num_experts=N, top_k=K, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(333, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for backend in ("triton", "megablocks"):
        moe.backend = backend
        y = moe(x)
        y.sum().backward()
        found[backend] = [y.detach(), x.grad, *(p.grad for p in moe.parameters())]
        x.grad = None
        moe.zero_grad()
    for ours, theirs in zip(found["triton"], found["megablocks"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2**-7 * theirs.abs().max().item(), rtol=2**-6)
