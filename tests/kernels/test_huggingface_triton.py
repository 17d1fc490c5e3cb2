"""transformers models on the Triton experts, against transformers' own eager experts in float64."""

import pytest

pytest.importorskip("transformers", minversion="5.7", reason="older ones take no experts but their own")

import torch
from hf_models import CONFIGS, choices, error, make_experts, run_experts, run_model, tiny_model
from kernel_checks import DEVICE

from libmoe_fast import ops
from libmoe_fast.huggingface import register_transformers
from libmoe_fast.kernels.run import observing

# count, permute (choices that the model's own router made), up, down, combine; da, dz, dW2, dW1, dx, combine
FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 5, 8


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    register_transformers()
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "triton")


@pytest.mark.parametrize("name", CONFIGS)
def test_models_are_as_accurate_as_eager(name):
    """Logits and all gradients in float32: error against float64 at most twice that of eager."""
    model = tiny_model(name, "eager").to(DEVICE)
    eager = run_model(model)
    exact = run_model(tiny_model(name, "eager").to(DEVICE).double())
    model.set_experts_implementation("libmoe_fast")
    launches = []
    with observing(launches.append):
        ours = run_model(model)
    layers = sum(hasattr(m, "_apply_gate") for m in model.modules())
    assert len(launches) == layers * (FORWARD_LAUNCHES + BACKWARD_LAUNCHES)
    assert 0 < error(ours, exact) <= 2 * error(eager, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"interleaved": True, "bias": True},  # rows and biases are reordered
        {"transposed": True, "bias": True},
        {"gated": False, "act": "gelu_new"},
    ],
    ids=str,
)
def test_layouts_are_as_accurate_as_batched_mm(layout, dtype):
    """Also in half precision, whose routing is given, so that no choice flips."""
    module = make_experts(**layout).to(DEVICE)
    x, index, weights = (t.to(DEVICE) for t in choices(tokens=21))
    exact = run_experts(module.double(), "batched_mm", x.double(), index, weights.double())
    arguments = x.to(dtype), index, weights.to(dtype)
    ours, theirs = (run_experts(module.to(dtype), name, *arguments) for name in ("libmoe_fast", "batched_mm"))
    assert ours["y"].dtype == dtype
    assert 0 < error(ours, exact) <= 2 * error(theirs, exact)


def test_sentinels_of_expert_parallelism():
    """Choices that another rank computes add nothing, and get no gradient."""
    module = make_experts().to(DEVICE)
    module._is_expert_parallel = True
    x, index, weights = (t.to(DEVICE) for t in choices(tokens=9))
    elsewhere = torch.zeros_like(index, dtype=torch.bool)
    elsewhere[::2, 1] = True
    ours = run_experts(module, "libmoe_fast", x, index.masked_fill(elsewhere, 5), weights)
    expected = run_experts(module, "batched_mm", x, index, weights.masked_fill(elsewhere, 0.0))
    assert (ours.pop("dweights")[elsewhere] == 0).all()
    del expected["dweights"]
    assert error(ours, expected) < 1e-5
