"""torch.library hygiene of every op (opcheck), autograd of the permutation, and the choice of backend."""

import itertools

import pytest
import torch

from libmoe_fast import BackendError, available_backends, extension, ops

pytestmark = pytest.mark.skipif(not extension.load().loaded, reason="the C++ extension is not built")
lib = torch.ops.libmoe_fast

T, K, N, D, H, O = 7, 2, 4, 5, 6, 3


@pytest.fixture
def permutation():
    torch.manual_seed(0)
    index = torch.rand(T, N).argsort(-1)[:, :K]
    return index, *lib.permute_index(index, N)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def expert_arguments(permutation):
    _, order, inverse, offsets = permutation
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    return leaf(T, D), None, weights, order, inverse, offsets, leaf(N, H, D), leaf(N, H), leaf(N, O, H), leaf(N, O)


def test_opcheck(permutation):
    """Schemas, fakes, autograd registration and dynamic-shape AOT dispatch."""
    index, order, inverse, _ = permutation
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    check = torch.library.opcheck
    check(lib.permute_index.default, (index, N))
    check(lib.gather.default, (leaf(T, D), order, K))
    check(lib.gather.default, (leaf(T, D), order, K, weights))
    check(lib.weighted_scatter.default, (leaf(T * K, O), inverse, K))
    check(lib.weighted_scatter.default, (leaf(T * K, O), inverse, K, weights))
    check(lib.row_dot.default, (torch.randn(T * K, O), torch.randn(T, O), inverse, K))
    x, _, *tensors = expert_arguments(permutation)
    check(lib.cpu_experts.default, (x, None, *tensors, "gelu", False, True))
    check(lib.cpu_experts.default, (x.detach(), leaf(T * K, D), *tensors, "gelu", False, True))
    check(ops.attach_aux_loss, (weights, leaf(), torch.ones(())))
    check(ops.aux_loss_gradient, (torch.rand(T, K), torch.ones(())))
    inputs = [t.detach() for t in (x, *tensors)]
    backward = (torch.randn(T, O, dtype=torch.float64), *inputs, torch.randn(T * K, H, dtype=torch.float64))
    for sum_over_k, weight_grads in itertools.product((True, False), repeat=2):
        check(lib.cpu_experts_backward.default, (*backward, "gelu", False, sum_over_k, weight_grads))


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_the_permutation(permutation, weighted):
    """First and second derivatives in float64."""
    _, order, inverse, _ = permutation
    weights = (torch.rand(T, K, dtype=torch.float64, requires_grad=True),) if weighted else ()
    gather = lambda x, *w: lib.gather(x, order, K, *w)  # noqa: E731
    scatter = lambda y, *w: lib.weighted_scatter(y, inverse, K, *w)  # noqa: E731
    assert torch.autograd.gradcheck(gather, (leaf(T, D), *weights))
    assert torch.autograd.gradcheck(scatter, (leaf(T * K, O), *weights))
    if not weighted:
        assert torch.autograd.gradgradcheck(gather, (leaf(T, D),))
        assert torch.autograd.gradgradcheck(scatter, (leaf(T * K, O),))


def test_saved_for_backward_is_x_z_and_routing(permutation):
    """2TD + 2TKH bytes in bf16, parameters and the routing (K int64 thrice, weights) aside."""
    x, _, weights, *rest = expert_arguments(permutation)
    x, *params = (t.detach().bfloat16().requires_grad_() for t in (x, *rest[3:]))
    weights, permuted = weights.detach().float().requires_grad_(), rest[:3]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lib.cpu_experts(x, None, weights, *permuted, *params, "gelu", False, True)
    known = {t.data_ptr() for t in (*params, *permuted, weights)}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in known) == 2 * T * D + 2 * T * K * H


def test_choice_of_backend(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(ops, "_triton_installed", True)
    assert available_backends().keys() == {"reference", "cpu", "triton", "megablocks"}
    assert available_backends()["cpu"] is None
    assert ops.choose_backend(None, cpu) == "cpu"
    assert ops.choose_backend(None, cuda) == "triton"
    assert ops.choose_backend(None, cuda, torch.float64) == "reference"  # kernels have no float64
    assert ops.choose_backend("reference", cpu) == "reference"
    with pytest.raises(BackendError, match="tokens are on cuda"):
        ops.choose_backend("cpu", cuda)
    with pytest.raises(BackendError, match="unknown backend 'fast'; choose one of reference, cpu, triton"):
        ops.choose_backend("fast", cpu)
    monkeypatch.setenv("LIBMOE_FAST_BACKEND", "reference")
    assert ops.choose_backend(None, cpu) == "reference"
    assert ops.choose_backend("cpu", cpu) == "cpu"  # the argument outranks the environment


def test_a_missing_extension_is_never_a_silent_fallback(monkeypatch):
    missing = extension.ExtensionState(loaded=False, reason="it was not built", hint="install g++")
    monkeypatch.setattr(ops, "_extension", missing)
    assert ops.choose_backend(None, torch.device("cpu")) == "reference"
    with pytest.raises(BackendError, match=r"'cpu' is not usable here: it was not built; install g\+\+"):
        ops.choose_backend("cpu", torch.device("cpu"))
