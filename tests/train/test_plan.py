"""`libmoe-fast plan`: what it counts, against closed forms, known models and a real run."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from libmoe_fast import ConfigError, MoE, moe_layers
from libmoe_fast.cli import main
from libmoe_fast.fused import tell_flop_counter
from libmoe_fast.routers import COMPARED
from libmoe_fast.train import plan as planning
from libmoe_fast.train.config import EngineConfig, ModelConfig, OptimConfig, TrainConfig
from libmoe_fast.train.plan import (
    GIB,
    SETTINGS,
    LiveBytes,
    Measured,
    memory_of,
    meta_model,
    offload_seconds,
    plan,
    run_batch,
)

TEXT = {
    "model_type": "phi3", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "pad_token_id": 0,
}  # fmt: skip
EYE = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "hidden_act": "quick_gelu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(planning.VISION, "small eye", EYE)
    monkeypatch.setitem(planning.LANGUAGE, "small", TEXT)


def config(stage=3, *, batch=2, **engine):
    engine = EngineConfig(**{"dtype": "fp32", "checkpointing": "off", "zero_stage": 0} | engine)
    return TrainConfig(model=ModelConfig(stage=stage), optim=OptimConfig(batch_size=batch), engine=engine)


def small_plan(settings, **options):
    given = {"samples": 1000, "text_tokens": 20, "images": 1.0, "gpus": 1, "gpu": "h100"}
    return plan(settings, vision="small eye", language="small", **given | options)


def siglip_parameters():
    """Patches, positions, 27 layers of attention, MLP and two norms, and the last norm."""
    D, F = 1152, 4304
    layer = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D
    return 3 * 14 * 14 * D + D + 256 * D + 27 * layer + 2 * D


@pytest.mark.parametrize("router", COMPARED)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_papers_models_at_true_size(setting, router):
    """Parameters as their authors count them; two scales make the projector's input twice as wide."""
    settings = TrainConfig(model=ModelConfig(stage=3, router=router, num_experts=4, top_k=2))
    options = {
        "vision": setting.vision,
        "language": setting.language,
        "scales": setting.scales,
        "dtype": torch.bfloat16,
    }
    dense = meta_model(TrainConfig(model=ModelConfig(stage=2)), **options)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in dense.model.named_children()}
    phi3 = counts["language_model"] + sum(p.numel() for p in dense.lm_head.parameters())
    assert phi3 == 3_821_079_552
    D = dense.config.vision_config.hidden_size
    assert counts["vision_tower"] == {1024: 303_507_456, 1152: siglip_parameters()}[D]
    assert counts["multi_modal_projector"] == 2 * D * 3072 + 3072 + 3072 * 3072 + 3072
    model = meta_model(settings, **options)
    layers = moe_layers(model).values()
    assert len(layers) == dense.config.vision_config.num_hidden_layers + 1
    copies = 3 * sum(p.numel() for layer in layers for p in layer.experts.parameters()) // 4
    gates = sum(p.numel() for layer in layers for p in layer.router.parameters())
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(counts.values()) + dense.lm_head.weight.numel() + copies + gates
    )


def test_operations_of_the_layer():
    """Experts 2 TK (DH + HO) and the gate 2 TND, twice that in backward; of frozen experts only the gradient of x."""
    T, D, H, O, N, K = 7, 12, 20, 8, 5, 2
    moe = MoE(D, H, O, num_experts=N, top_k=K, backend=planning.counted_backend(), aux_mode="off")
    x = torch.randn(T, D, requires_grad=True)
    tell_flop_counter()
    once, gate = 2 * T * K * (D * H + H * O), 2 * T * N * D
    with FlopCounterMode(display=False) as flops:
        y = moe(x)
    assert flops.get_total_flops() == once + gate
    with FlopCounterMode(display=False) as flops:
        y.sum().backward()
    assert flops.get_total_flops() == 2 * (once + gate)
    moe.experts.requires_grad_(False)
    y = moe(x)
    with FlopCounterMode(display=False) as flops:
        y.sum().backward()
    assert flops.get_total_flops() == once + 2 * gate


def by_hand(length, *, experts, layers, products, attention, patches):
    """Operations of one sample of the small model: how often each kind of product runs, and how many layers of its eye
    do.
    """
    D, F, L = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["num_hidden_layers"]
    d, f, seen = EYE["hidden_size"], EYE["intermediate_size"], 17  # 16 patches and the class token
    linear = length * (L * (3 * D * D + D * D + 3 * D * F) + D * TEXT["vocab_size"])
    linear += seen * layers * (4 * d * d + experts * 2 * d * f) + 16 * experts * (d * D + D * D)
    if experts > 1:
        linear += 4 * d * (seen * layers + 16)  # gates
    scores = L * 2 * length * length * D + layers * 2 * seen * seen * d
    return 2 * (products * linear + attention * scores + patches * 16 * 3 * 14 * 14 * d)


@pytest.mark.parametrize(("stage", "experts"), [(2, 1), (3, 2)], ids=["dense", "two experts per token"])
def test_operations_of_a_step(stage, experts):
    """Backward is two products for one, five for attention's two, and one for the patches, whose image needs none. The
    eye's last layer is not read (vision_feature_layer -2): it runs forward only.
    """
    forward = by_hand(36, experts=experts, layers=4, products=1, attention=1, patches=1)
    backward = by_hand(36, experts=experts, layers=3, products=2, attention=2.5, patches=1)
    flops = small_plan(config(stage, batch=2)).measured.flops
    assert flops == pytest.approx(2 * (forward + backward), rel=1e-6)
    recomputed = small_plan(config(stage, batch=2, checkpointing="non_reentrant")).measured.flops
    assert 1.2 < recomputed / flops < 1.34  # layers run twice forward; projector and head once
    assert small_plan(config(stage, batch=6)).measured.flops == pytest.approx(3 * flops, rel=1e-6)


def test_stage_1_trains_the_projector_alone():
    got = small_plan(config(1))
    D, d = TEXT["hidden_size"], EYE["hidden_size"]
    assert got.measured.trained == d * D + D + D * D + D
    assert got.measured.active == got.measured.total
    assert got.measured.flops < 0.75 * small_plan(config(2)).measured.flops


@pytest.mark.parametrize("checkpointing", ["off", "non_reentrant"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activations_are_those_of_a_real_run(stage, checkpointing):
    """The same model with weights, on the CPU, through torch's own attention there."""
    settings = config(stage, batch=3, checkpointing=checkpointing)
    counted = small_plan(settings).measured.activations
    options = {"vision": "small eye", "language": "small", "scales": (1,), "dtype": torch.float32}
    model = meta_model(settings, **options)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor, 0) if not tensor.is_floating_point() else torch.nn.init.normal_(
            tensor, std=0.02
        )
    planning.recompute_activations(model, settings)
    model.train().set_attn_implementation("sdpa")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveBytes(model) as live:
        run_batch(model, images=3, batch=3, length=36, dtype=torch.float32)
    assert live.most == pytest.approx(counted, rel=0.05)


def test_live_bytes():
    weight = torch.nn.Linear(4, 4)
    with LiveBytes(weight) as live:
        a = torch.empty(10)
        b = a[2:5]  # of the same memory
        c = torch.empty(100)
        del c
        assert (live.now, live.most) == (40, 440)
        del a
        assert live.now == 40
        weight.weight.t()
        del b
        assert live.now == 0
    assert live.most == 440


MEASURED = Measured(
    total=10**9, active=9 * 10**8, trained=8 * 10**8, experts=4 * 10**8, moe_layers=3, image_tokens=16,
    batch=2, flops=1e12, activations=5e8, weight_bytes=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "offload", "expected", "host"),
    [
        (0, False, {"weights": 2.0, "gradients": 1.6, "optimizer state": 9.6}, 0),
        (1, False, {"weights": 2.0, "gradients": 1.6, "optimizer state": 2.4}, 0),
        (2, False, {"weights": 2.0, "gradients": 0.4, "optimizer state": 2.4}, 0),
        (3, False, {"weights": 0.5, "gradients": 0.4, "optimizer state": 2.4}, 0),
        (2, True, {"weights": 2.0, "gradients": 0.0, "optimizer state": 0.0}, 4 * (2.4 + 0.4)),
        (3, True, {"weights": 0.0, "gradients": 0.0, "optimizer state": 0.0}, 4 * (2.4 + 0.4) + 2.0),
    ],
)
def test_what_zero_shards(stage, offload, expected, host):
    """2 bytes of weights and gradients, 12 of optimizer state per trained parameter (ZeRO, figure 1)."""
    settings = config(dtype="bf16", zero_stage=stage, offload=offload)
    parts, on_host = memory_of(MEASURED, settings, gpus=4)
    assert {part: parts[part] / 1e9 for part in expected} == pytest.approx(expected)
    assert on_host / 1e9 == pytest.approx(host)
    assert parts["activations"] == 5e8


def test_what_processes_share_of_the_experts():
    """Of 1 billion parameters 0.4 are experts': with a quarter of those, 0.7. What ZeRO cuts is cut as before."""
    settings = config(dtype="bf16", zero_stage=2, expert_parallel=4)
    parts, _ = memory_of(MEASURED, settings, gpus=8)
    assert parts["weights"] == pytest.approx(2 * 0.7e9)
    assert parts["gradients"] == pytest.approx(2 * 0.8e9 / 8)
    assert parts["optimizer state"] == pytest.approx(12 * 0.8e9 / 8)
    with pytest.raises(ConfigError, match="which do not divide the 6 of this run"):
        small_plan(settings, gpus=6)


@pytest.mark.parametrize(
    ("stage", "checkpointing", "billions"),
    [(2, "non_reentrant", 0.8 * 5), (3, "non_reentrant", 0.8 * 5 + 12), (3, "off", 0.8 * 5 + 8)],
)
def test_time_of_offload(stage, checkpointing, billions):
    """4 micro-batches: gradients 4 times, new weights once, and at stage 3 all weights 3 or 2 times for each."""
    settings = config(dtype="bf16", zero_stage=stage, offload=True, checkpointing=checkpointing)
    settings.optim.accumulation = 4
    seconds = offload_seconds(MEASURED, settings, gpus=16, host_bandwidth=50e9, link=10e9)
    assert seconds == pytest.approx(0.8 * 28 / (2 * 50) + billions * 2 / (16 * 10))  # 16 GPUs are two hosts
    settings.engine.offload = False
    assert offload_seconds(MEASURED, settings, gpus=16, host_bandwidth=50e9, link=10e9) == 0


def test_steps_hours_and_disk():
    settings = config(2, batch=2, dtype="bf16", zero_stage=2)
    settings.optim.accumulation, settings.data.fraction = 4, 0.5
    got = small_plan(settings, gpus=8, gpu="a100-80g", utilisation=0.5)
    assert got.steps == 8  # 500 samples, 64 at a time
    assert got.flops == pytest.approx(got.measured.flops / 2 * 64 * 8)
    assert got.hours == pytest.approx(got.flops / (8 * 312e12 * 0.5) / 3600)
    assert got.checkpoint == got.measured.total * (2 + 12)
    assert got.final == got.measured.total * 2
    assert got.fits
    assert not dataclasses.replace(got, memory={"weights": 81 * GIB}).fits


def test_in_words(capsys):
    arguments = ["plan", "--model.stage", "3", "--vision", "small eye", "--language", "small", "--gpus", "2"]
    assert main([*arguments, "--samples", "100", "--gpu", "rtx4090"]) == 0
    out = capsys.readouterr().out
    assert "MoE layers" in out
    assert "it fits" in out
    assert "on 2 x rtx4090 at 40% of 165 TFLOP/s" in out
    assert main(["plan", "--gpus", "2"]) == 2
    assert "--language is not given; choose phi3-mini-4k" in capsys.readouterr().err
    assert main([*arguments, "--utilisation", "1.5"]) == 2
    assert "utilisation is 1.5; it must be above 0 and at most 1" in capsys.readouterr().err
    assert main([*arguments[:-1], "0"]) == 2
    assert "gpus is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="gpu is 'tpu'"):
        small_plan(config(), gpu="tpu")


def test_samples_without_an_image_take_none_of_its_operations():
    """Text of the same length: half the images are half of the eye's and the projector's operations."""
    counts = {
        images: small_plan(config(2, batch=2), images=images, text_tokens=36 - 16 * images).measured.flops
        for images in (0.0, 0.5, 0.75, 1.0)
    }
    eye = counts[1.0] - counts[0.0]
    assert counts[0.5] == pytest.approx(counts[0.0] + eye / 2, rel=1e-6)
    assert counts[0.75] == pytest.approx(counts[0.0] + 0.75 * eye, rel=1e-6)
    assert eye > 0.1 * counts[0.0]


@pytest.mark.parametrize("option", [("optim.batch_size", "0"), ("engine.zero_stage", "4"), ("model.stage", "5")])
def test_settings_that_training_refuses_are_refused(option, capsys):
    """Before anything is counted, and in the same words."""
    command = ["plan", "--vision", "small eye", "--language", "small", f"--{option[0]}", option[1]]
    assert main(command) == 2
    assert f"{option[0]} is {option[1]}" in capsys.readouterr().err
