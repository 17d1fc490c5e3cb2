"""Swapped layers in other people's wrappers: the same losses as the plain model's, or a word that says why not."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import libmoe_fast
from libmoe_fast import MoE, available_backends, load_model, load_weights, moe_layers, save_model, upcycle
from libmoe_fast.errors import BackendError, CheckpointError
from libmoe_fast.train.tiny import tiny_llava

FUSED = [name for name, missing in available_backends().items() if name != "reference" and missing is None]


@pytest.fixture(scope="module")
def swapped():
    model, processor = tiny_llava("clip", dim=16, vision_layers=2, text_layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        upcycle(model, num_experts=3)
    ids = processor.tokenizer("<image>" * 16 + " odd?", return_tensors="pt")["input_ids"]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "pixel_values": pixels, "labels": ids}


# ---------------------------------------------------------------------------------------------------------------------
# peft


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["experts.w1", "experts.w2"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts", "router"]},
    ],
    ids=["LoRA on experts", "routers trained beside", "experts trained beside"],
)
def test_peft_trains_merges_and_reloads(swapped, options, tmp_path):
    peft = pytest.importorskip("peft")
    model, batch = swapped
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.train()(**batch).loss.backward()
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is not None}
    experts = {name for name in learning if "projector" in name and "experts" in name}
    assert experts if "experts" in str(options) else not experts
    assert all(adapted.get_parameter(name).grad.abs().max() > 0 for name in learning)
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        assert (expected - model.eval()(**batch).logits).abs().max() > 1e-3 or "modules_to_save" in options
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")
        assert torch.equal(again.eval()(**batch).logits, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    save_model(merged, tmp_path / "merged")
    assert torch.equal(load_model(tmp_path / "merged")(**batch).logits, merged(**batch).logits)
    assert {layer.sizes["in_features"] for layer in moe_layers(merged).values()} == {16}


# ---------------------------------------------------------------------------------------------------------------------
# DDP, FSDP, ZeRO-3


def test_two_processes_in_ddp_fsdp_and_zero3(tmp_path):
    script = Path(__file__).with_name("wrapper_runs.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*torchrun, script, tmp_path], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = dict(line.split(": ") for line in (tmp_path / f"rank{rank}.txt").read_text().splitlines())
        assert found.keys() == {
            "DDP",
            "FSDP1",
            "FSDP2",
            "FSDP2 saved",
            "ZeRO-3 from_pretrained",
            "ZeRO-3 saved",
            "sharded before",
        }
        assert "upcycle the model first, then call fully_shard" in found.pop("sharded before")
        assert {name: float(value) for name, value in found.items()} == pytest.approx(dict.fromkeys(found, 0), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives of derivatives


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("weight", [1.0, None], ids=["constant", "computed"])  # whether what arrives is a constant
def test_fused_backends_say_that_they_are_not_differentiable_twice(backend, weight):
    """A gradient penalty in a loss that has other terms would else train on nothing, without a word."""
    layer = MoE(8, 16, 8, num_experts=3, top_k=2, backend=backend)
    x = torch.randn(5, 8, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum() if weight else y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="backend='reference' is"):
        (y.sum() + gradient.pow(2).sum()).backward()


def test_the_reference_is_differentiable_twice():
    torch.manual_seed(0)
    layer = MoE(4, 6, 4, num_experts=3, top_k=2, backend="reference", dtype=torch.float64, aux_mode="off")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


# ---------------------------------------------------------------------------------------------------------------------
# Dense weights, loaded after upcycling


@pytest.mark.parametrize("router", ["smoe", "cosine", "hyper"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)),
        lambda: tiny_llava("clip", dim=16, vision_layers=1, text_layers=1)[0].model.multi_modal_projector,
        lambda: tiny_llava("clip", dim=16, vision_layers=1, text_layers=1)[0].model.vision_tower.encoder.layers[0].mlp,
        lambda: tiny_llava("clip", dim=16, vision_layers=1, text_layers=1)[0].model.language_model.layers[0].mlp,
    ],
    ids=["LLaVA's mm_projector", "multi_modal_projector", "CLIPMLP", "Phi3MLP"],
)
def test_dense_weights_go_into_every_expert(build, router):
    """LLaVA's scripts load mm_projector.bin into a model that may be upcycled by then."""
    torch.manual_seed(0)
    dense = build()
    layer = MoE.from_dense(build(), router=router, num_experts=3)
    stored = {name: torch.randn_like(tensor) for name, tensor in dense.state_dict().items()}
    router_before = {name: tensor.clone() for name, tensor in layer.router.state_dict().items()}
    holder = nn.ModuleDict({"mm_projector": layer})
    assert not any(holder.load_state_dict({f"mm_projector.{name}": t for name, t in stored.items()}))
    dense.load_state_dict(stored)
    x = torch.randn(1, 5, layer.sizes["in_features"])
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(layer.router.state_dict()[name], tensor) for name, tensor in router_before.items())
    assert len({t.data_ptr() for t in layer.experts.w1}) == 3


def test_other_weights_are_still_refused():
    layer = MoE.from_dense(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), num_experts=2)
    for stored, message in [
        ({"0.weight": torch.ones(16, 8)}, "Missing"),
        ({"0.weight": torch.ones(8, 16), "0.bias": torch.ones(16), "2.weight": torch.ones(4, 16)}, "size mismatch"),
        ({"0.weight": torch.ones(16, 8), "2.weight": torch.ones(4, 16), "4.weight": torch.ones(4)}, "Unexpected"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(stored)
    assert libmoe_fast.moe_layers(layer) == {"": layer}


# ---------------------------------------------------------------------------------------------------------------------
# torch.func, forward mode, torch.jit


@pytest.mark.parametrize("router", ["smoe", "hyper"])  # with auxiliary losses, attached, and without
def test_torch_func_goes_through_the_reference(router, monkeypatch):
    # A run with ZeRO-3 in this process, in another file, leaves DeepSpeed's own, which has no forward mode.
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)
    torch.manual_seed(0)
    moe, x = (
        MoE(6, 8, 6, num_experts=4, top_k=2, router=router, backend="reference").double(),
        torch.randn(5, 6).double(),
    )
    moe.eval()
    learned = {name: p.detach() for name, p in moe.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(moe, p, (x,)).square().mean())(learned)
    moe(x).square().mean().backward()
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(
            found[name], torch.zeros_like(found[name]) if parameter.grad is None else parameter.grad
        )
    _, along = torch.func.jvp(moe, (x,), (x,))
    jacobian = torch.autograd.functional.jacobian(moe, x)
    torch.testing.assert_close(along, torch.einsum("abcd,cd->ab", jacobian, x))
    torch.testing.assert_close(torch.func.vmap(moe)(x.expand(3, 5, 6)), moe(x).expand(3, 5, 6))
    traced = torch.jit.trace(moe, x)
    torch.testing.assert_close(traced(x.flip(0)), moe(x.flip(0)))


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda moe, x: torch.func.grad(lambda x: moe(x).sum())(x), r"torch\.func \(grad\)"),
        (lambda moe, x: torch.func.vmap(moe)(x.expand(3, 5, 6)), r"torch\.func \(vmap\)"),
        (lambda moe, x: torch.func.jvp(moe, (x,), (x,)), r"torch\.func \(jvp\)"),
        (lambda moe, x: dual(moe, x), "forward-mode differentiation"),
        (lambda moe, x: torch.jit.trace(moe, x), r"torch\.jit\.trace"),
    ],
    ids=["grad", "vmap", "jvp", "dual numbers", "trace"],
)
def test_what_fused_ops_cannot_see_through_is_an_error(use, name):
    """In forward mode the derivative would be lost without a word."""
    moe, x = MoE(6, 8, 6, num_experts=4, top_k=2, backend="cpu"), torch.randn(5, 6)
    with pytest.raises(BackendError, match=f"{name} does not go through backend 'cpu'; backend='reference' is"):
        use(moe, x)


def dual(moe, x):
    with torch.autograd.forward_ad.dual_level():
        return moe(torch.autograd.forward_ad.make_dual(x, x))


def test_other_functions_go_through_torch_func_beside_a_layer():
    """A layer that is there, in whatever mode, must not be seen by a gradient that has nothing to do with it."""
    layer = MoE(6, 8, 6, num_experts=4, top_k=2)
    x = torch.randn(5, 6)
    torch.testing.assert_close(torch.func.grad(lambda x: x.square().sum())(x), 2 * x)
    hessian = torch.func.hessian(lambda x: x.pow(3).sum())(x[0])
    torch.testing.assert_close(hessian, torch.diag(6 * x[0]))
    assert layer.training


# ---------------------------------------------------------------------------------------------------------------------
# accelerate


def outputs(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_accelerate_loads_what_was_saved(swapped, tmp_path):
    """A model on the meta device, its layers swapped there: nothing is drawn, all comes from the file."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = swapped
    save_model(model, tmp_path)
    with accelerate.init_empty_weights():
        empty = upcycle(type(model)(model.config), num_experts=3)
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "libmoe_fast.safetensors"), device_map={"": "cpu"}
    )
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_accelerate_offloads(where, swapped, tmp_path):
    """Weights that are not there between a layer's forwards: brought in by hooks, on the router and the experts too."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = swapped
    moved = copy.deepcopy(model)
    folder = () if where == "cpu_offload" else (str(tmp_path),)
    getattr(accelerate, where)(moved, *folder, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in moved.parameters())
    assert torch.equal(outputs(moved, inputs), outputs(model, inputs))


# ---------------------------------------------------------------------------------------------------------------------
# bitsandbytes


@pytest.fixture(params=[{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["8 bits", "4 bits"])
def quantization(request):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    return BitsAndBytesConfig(**request.param, llm_int8_skip_modules=kept)


@pytest.fixture
def quantized(quantization, tmp_path):
    """A dense model whose language model is quantised, and its whole weights in a folder."""
    dense, _ = tiny_llava("clip", dim=16, vision_layers=2, text_layers=1)
    dense.save_pretrained(tmp_path / "dense")
    return type(dense).from_pretrained(tmp_path / "dense", quantization_config=quantization), dense


def linear_layers(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}


def test_experts_learn_beside_a_quantized_language_model(quantized, swapped, tmp_path):
    model, inputs = quantized[0], swapped[1]
    dense = outputs(model, inputs)
    upcycle(model, num_experts=3, trainable=True)
    torch.testing.assert_close(outputs(model, inputs), dense)
    model.train()(**inputs).loss.backward()
    learning = [layer.experts.w1.grad for layer in moe_layers(model).values() if layer.experts.w1.grad is not None]
    assert len(learning) == 2  # LLaVA leaves out the tower's last layer
    assert all(grad.abs().max() > 0 for grad in learning)
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.1).step()

    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert linear_layers(loaded) == linear_layers(model)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert (outputs(loaded, inputs) - dense).abs().max() > 1e-4


@pytest.mark.parametrize("ours", [True, False], ids=["save_model", "save_pretrained"])
def test_whole_weights_are_quantized_as_they_are_read(ours, quantized, quantization, swapped, tmp_path):
    """Experts that are copies: the dense model, quantised by transformers itself, says what comes out."""
    (model, whole), inputs = quantized, swapped[1]
    upcycle(whole, num_experts=3)
    save_model(whole, tmp_path / "moe") if ours else whole.save_pretrained(tmp_path / "moe")
    loaded = load_model(tmp_path / "moe", quantization_config=quantization)
    assert {*linear_layers(loaded).items()} <= {*linear_layers(model).items()}
    assert any(kind != "Linear" for kind in linear_layers(loaded).values())
    torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs))
    for name, layer in moe_layers(whole).items():
        assert torch.equal(layer.experts.w1, moe_layers(loaded)[name].experts.w1)


def test_given_weights_of_a_quantized_model_are_refused(quantized, tmp_path):
    """transformers would write the model's own instead, without a word."""
    model = upcycle(quantized[0], num_experts=3)
    with pytest.raises(CheckpointError, match="is quantised"):
        save_model(model, tmp_path / "moe", state_dict=model.state_dict())
    assert not (tmp_path / "moe").exists()


def test_whole_weights_do_not_go_into_a_quantized_model(quantized, tmp_path):
    model, whole = quantized
    save_model(upcycle(whole, num_experts=3), tmp_path / "moe")
    with pytest.raises(CheckpointError, match="is quantised"):
        load_weights(model, tmp_path / "moe")
