"""transformers models on our experts: equal to transformers' own implementations, or refused. CPU backends."""

import inspect
import subprocess
import sys

import pytest

pytest.importorskip("transformers", minversion="5.7", reason="older ones take no experts but their own")

import torch
from backends import CPU_BACKENDS
from hf_models import (
    CONFIGS,
    assert_equal,
    choices,
    error,
    make_experts,
    run_experts,
    run_model,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from libmoe_fast import BackendError, ConfigError, huggingface, ops
from libmoe_fast.huggingface import experts_forward, register_transformers, stacked_weights

# What transformers calls the activations that we have kernels for.
OUR_ACTIVATIONS = {
    *("gelu", "gelu_python", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
    *("quick_gelu", "relu", "silu", "swish"),
}


@pytest.fixture(autouse=True)
def _registered():
    register_transformers()


@pytest.fixture(params=CPU_BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """Grows by one for each call of our experts."""
    seen = []
    real = ops.experts
    monkeypatch.setattr(ops, "experts", lambda *args, **options: seen.append(args) or real(*args, **options))
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# Equal to transformers


@pytest.mark.parametrize("name", CONFIGS)
def test_models_equal_eager(name, backend, calls):
    """Logits and all gradients in float64, switched to and from our experts in place."""
    model = tiny_model(name, "eager").double()
    eager = run_model(model)
    assert sum("experts" in key for key in eager) >= 2, "no expert got a gradient"
    assert not calls
    model.set_experts_implementation("libmoe_fast")
    ours = run_model(model)
    assert len(calls) == sum(hasattr(m, "_apply_gate") for m in model.modules()) > 0
    assert_equal(ours, eager, rounded=name == "nemotron_h")  # its eager experts sum in float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ["gate, up", "interleaved", "no gate"])
def test_layouts_equal_batched_mm(rows, transposed, bias, backend):
    """Every combination that transformers' decorator can declare, also those that no model of it uses yet."""
    module = make_experts(gated=rows != "no gate", interleaved=rows == "interleaved", transposed=transposed, bias=bias)
    module.double()
    arguments = [t.double() if t.is_floating_point() else t for t in choices(tokens=9)]
    ours = run_experts(module, "libmoe_fast", *arguments)
    assert_equal(ours, run_experts(module, "batched_mm", *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_transformers(dtype, backend):
    """Error against float64 at most twice that of transformers in the same dtype; the output keeps the dtype."""
    module, arguments = make_experts(), choices(tokens=33)
    truth = run_experts(module.double(), "batched_mm", *(t.double() if t.is_floating_point() else t for t in arguments))
    x, index, weights = arguments
    arguments = x.to(dtype), index, weights.to(dtype)  # many models give the gate weights in the model's dtype
    ours, theirs = (run_experts(module.to(dtype), name, *arguments) for name in ("libmoe_fast", "batched_mm"))
    assert ours["y"].dtype == ours["dx"].dtype == ours["dweights"].dtype == dtype
    assert 0 < error(ours, truth) <= 2 * error(theirs, truth)


@pytest.mark.parametrize("tokens", [torch.float32, torch.bfloat16])  # after a norm, and after a linear layer
def test_autocast(tokens, backend):
    """Under autocast float32 weights run in bfloat16: the output has the dtype of the tokens, gradients are float32."""
    module, (x, index, weights) = make_experts(), choices(tokens=9)
    exact = run_experts(module, "libmoe_fast", x, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run_experts(module, "libmoe_fast", x.to(tokens), index, weights)
    assert {name for name, t in ours.items() if t.dtype == tokens} >= {"y", "dx"}
    assert {t.dtype for name, t in ours.items() if name not in ("y", "dx")} == {torch.float32}
    assert 1e-4 < error(ours, exact) < 2e-2  # bfloat16 has a precision of 4e-3


def test_sentinels_of_expert_parallelism(backend):
    """Choices that another rank computes add nothing, whatever their weight: two ranks' halves sum to the whole."""
    whole = make_experts(sizes=(6, 12, 20)).double()
    x, index, weights = choices(tokens=9, sizes=(6, 12, 20))
    x, weights = x.double(), weights.double()
    expected = run_experts(whole, "batched_mm", x, index, weights)
    halves = []
    for first in (0, 3):
        rank = make_experts(sizes=(3, 12, 20)).double()
        rank._is_expert_parallel = True
        with torch.no_grad():
            rank.gate_up_proj.copy_(whole.gate_up_proj[first : first + 3])
            rank.down_proj.copy_(whole.down_proj[first : first + 3])
        local = torch.where((index >= first) & (index < first + 3), index - first, 3)
        assert (local == 3).any()
        assert (local < 3).any()
        halves.append(experts_forward(rank, x, local, weights))
    torch.testing.assert_close(halves[0] + halves[1], expected["y"])


def test_no_tokens(backend):
    """A rank without tokens still takes part in backward."""
    module = make_experts()
    results = run_experts(module, "libmoe_fast", *choices(tokens=0))
    assert results["y"].shape == (0, 20)
    assert all((t == 0).all() for t in results.values())


def test_runs_on_the_meta_device():
    """Shapes only, as memory estimators run models."""
    arguments = [t.to("meta") for t in choices(tokens=3)]
    assert make_experts().to("meta")(*arguments).shape == (3, 20)


def test_weights_are_not_copied():
    """The usual layout is ours; a transposed one is only a view."""
    module = make_experts(bias=True)
    expected = (module.gate_up_proj, module.gate_up_proj_bias, module.down_proj, module.down_proj_bias)
    assert all(given is parameter for given, parameter in zip(stacked_weights(module), expected, strict=True))
    module = make_experts(transposed=True)
    w1, _, w2, _ = stacked_weights(module)
    assert w1.data_ptr() == module.gate_up_proj.data_ptr()
    assert w2.data_ptr() == module.down_proj.data_ptr()


def test_compiles_without_graph_breaks(backend):
    """The first forward, in which activations are recognised, is a traced one."""
    model = tiny_model("mixtral", "libmoe_fast")
    ids = torch.arange(2, 8).unsqueeze(0)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    grad = model.model.layers[0].mlp.experts.gate_up_proj.grad
    grad, model.model.layers[0].mlp.experts.gate_up_proj.grad = grad.clone(), None
    expected = model(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(grad, model.model.layers[0].mlp.experts.gate_up_proj.grad)


def test_exports(monkeypatch):
    """torch.export too meets activations for the first time under its own modes."""
    monkeypatch.setenv(ops.ENVIRONMENT_VARIABLE, "reference")
    module = make_experts()
    exported = torch.export.export(module, choices(tokens=6), strict=False).module()
    torch.testing.assert_close(exported(*choices(tokens=6)), module(*choices(tokens=6)))


# ---------------------------------------------------------------------------------------------------------------------
# Recognised, or refused


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", sorted(set(ACT2FN) | OUR_ACTIVATIONS))
def test_activations_are_recognised_or_refused(act, gated):
    """All that transformers has, by what they compute."""
    module, arguments = make_experts(act=act, gated=gated, transposed=True), choices(tokens=9)
    if act in OUR_ACTIVATIONS:
        ours = run_experts(module, "libmoe_fast", *arguments)
        assert error(ours, run_experts(module, "batched_mm", *arguments)) < 1e-5
    else:
        with pytest.raises(ConfigError, match=r"does not compute act|has parameters"):
            module(*arguments)


GATES = {
    "clamped far out": lambda gate, up: nn.functional.silu(gate.clamp(max=1e5)) * up,
    "clamped up": lambda gate, up: nn.functional.silu(gate) * up.clamp(-10, 10),
    "up + 1": lambda gate, up: nn.functional.silu(gate) * (up + 1),
    "alpha": lambda gate, up: gate * torch.sigmoid(1.1 * gate) * up,
    "halves swapped": lambda gate, up: nn.functional.silu(up) * gate,
    "no product": lambda gate, up: nn.functional.silu(gate) + up,
}


@pytest.mark.parametrize("gate", GATES)
def test_other_gates_are_refused(gate):
    with pytest.raises(ConfigError, match="does not compute act"):
        make_experts(gate=GATES[gate])(*choices(tokens=3))


def test_gate_in_float32_is_recognised():
    """Beam computes its gate in float32: so do our kernels."""
    module = make_experts(gate=lambda gate, up: (nn.functional.silu(gate.float()) * up.float()).to(gate.dtype))
    assert huggingface.recognise(module) == "silu"


def test_another_activation_is_noticed():
    """ReLU swapped in after a forward must not run as the SiLU that was."""
    module, arguments = make_experts(), choices(tokens=9)
    module(*arguments)
    module.act_fn = nn.ReLU()
    ours, theirs = (run_experts(module, name, *arguments) for name in ("libmoe_fast", "batched_mm"))
    assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("setting", [{"swiglu_limit": 5.0}, {"swiglu_alpha": 1.5}], ids=str)
def test_other_settings_of_gpt_oss_are_refused(setting):
    """The message names the class and a way out."""
    config = GptOssConfig(**{**CONFIGS["gpt_oss"]().to_dict(), **setting})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="libmoe_fast")
    with pytest.raises(ConfigError, match=r"GptOssExperts does not compute .*silu.*; run this model with .*grouped_mm"):
        model(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.skipif(
    "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters,
    reason="transformers 5.20 brought these experts",
)
def test_post_expert_norm_is_refused():
    with pytest.raises(ConfigError, match="normalizes each expert's output"):
        make_experts(post_norm=True)(*choices(tokens=3))


def test_unknown_parameters_are_refused():
    """An adapter or a scale that the kernels know nothing of must not be left out silently."""
    module = make_experts(extra={"down_proj_scale": nn.Parameter(torch.ones(5))})
    with pytest.raises(ConfigError, match="has parameters that libmoe_fast would leave out: down_proj_scale"):
        module(*choices(tokens=3))


def test_parametrized_weights_are_used():
    """torch.nn.utils.parametrize (adapters, 4-bit weights): the weight is what the parametrization computes."""

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module, arguments = make_experts(), choices(tokens=3)
    nn.utils.parametrize.register_parametrization(module, "down_proj", Doubled())
    ours, theirs = (run_experts(module, name, *arguments) for name in ("libmoe_fast", "batched_mm"))
    assert error(ours, theirs) < 1e-5


def test_other_dtype_is_refused():
    x, index, weights = choices(tokens=3)
    with pytest.raises(ConfigError, match=r"tokens are torch.bfloat16, but the weights of Experts are torch.float32"):
        make_experts()(x.bfloat16(), index, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Registering


def test_register_twice_is_once():
    register_transformers()
    assert list(ALL_EXPERTS_FUNCTIONS).count("libmoe_fast") == 1
    assert ALL_EXPERTS_FUNCTIONS["libmoe_fast"] is experts_forward
    assert tiny_model("mixtral", "libmoe_fast").config._experts_implementation == "libmoe_fast"


@pytest.mark.parametrize("missing", ["transformers.integrations.moe", "transformers"])
def test_transformers_missing_or_too_old(missing, monkeypatch):
    for name in [name for name in sys.modules if name == missing or name.startswith("transformers.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises ImportError
    with pytest.raises(BackendError, match=r"transformers 5.7 or newer.*pip install"):
        register_transformers()


def test_an_interface_that_takes_no_other_experts(monkeypatch):
    """transformers 5.0 to 5.6 list the implementations that they accept; registering ours would only fail at load."""
    monkeypatch.setattr(huggingface, "installed_version", lambda name: "5.6.2")
    with pytest.raises(BackendError, match=r"5.7 or newer.*found 5.6.2.*pip install"):
        register_transformers()


def test_import_leaves_transformers_and_the_compiler_alone():
    code = "import sys, libmoe_fast.huggingface; assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)
