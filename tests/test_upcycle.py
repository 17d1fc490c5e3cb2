"""Upcycling whole models: equality with the dense model, what is found, and the loss hooks."""

import copy
import warnings

import pytest
import torch
from torch import nn

import libmoe_fast
from libmoe_fast import ROUTERS, ConfigError, MoE, moe_layers, upcycle
from libmoe_fast.train.tiny import tiny_llava


def batch(model, processor, answer="7<|end|>"):
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = "<|user|>\n" + "<image>" * model.config.image_seq_length + "\nWhat digit is this?<|end|>\n<|assistant|>\n"
    ids = processor.tokenizer([text + answer] * 2, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": pixel_values}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dense(request):
    return tiny_llava(request.param)


@pytest.fixture
def model_and_batch(dense):
    model, processor = dense
    return copy.deepcopy(model), batch(model, processor)


class OriginalLlava(nn.Module):
    """The module layout of the original LLaVA: get_vision_tower().vision_tower, get_model().mm_projector."""

    def __init__(self, vision_model):
        super().__init__()

        class CLIPVisionTower(nn.Module):
            def __init__(self):
                super().__init__()
                self.vision_tower = vision_model

            def forward(self, images):
                with torch.no_grad():
                    return self.vision_tower(images).last_hidden_state

        dim = vision_model.config.hidden_size
        self.model = nn.Module()
        self.model.vision_tower = CLIPVisionTower()
        self.model.mm_projector = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, images):
        return self.model.mm_projector(self.model.vision_tower(images))


def run_and_train(model, images, *, times):
    for _ in range(times):
        model(images).sum().backward()


@pytest.mark.parametrize(
    "router", [name for name in ROUTERS if name not in ("tc_moe", "moe_plus_plus")]
)  # weights not summing to 1
def test_upcycled_llava_equals_dense(model_and_batch, router):
    model, inputs = model_and_batch
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        actual = upcycle(model, router=router)(**inputs).logits
    assert len(moe_layers(model)) == 5  # four vision layers and the projector
    assert (actual - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("targets", "layers"), [("vision", 4), (("projector",), 1)], ids=["vision", "projector"])
def test_targets_are_selectable(model_and_batch, targets, layers):
    model, _ = model_and_batch
    assert len(moe_layers(upcycle(model, targets=targets))) == layers


def test_the_text_model_stays_dense(model_and_batch):
    model, _ = model_and_batch
    assert not any("language_model" in name for name in moe_layers(upcycle(model)))


def test_gates_are_independent_per_layer_and_experts_equal(model_and_batch):
    model, _ = model_and_batch
    layers = list(moe_layers(upcycle(model, targets="vision")).values())
    gates = torch.stack([layer.router.weight for layer in layers]).flatten(1)
    correlation = torch.corrcoef(gates) - torch.eye(len(layers))
    assert correlation.abs().max() < 5 / gates.shape[1] ** 0.5  # 5 sigma of independent draws
    for layer in layers:
        assert torch.equal(layer.experts.w1, layer.experts.w1[:1].expand_as(layer.experts.w1))


def test_original_llava_layout():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    model, images = OriginalLlava(CLIPVisionModel(config)).eval(), torch.randn(1, 3, 16, 16)
    expected = model(images)
    upcycle(model)
    assert len(moe_layers(model)) == 3
    assert isinstance(model.model.mm_projector, MoE)
    torch.testing.assert_close(model(images), expected)
    model.train()
    with pytest.warns(UserWarning, match="run 3 times in a row without gradients: .* will NOT train") as warned:
        run_and_train(model, images, times=4)
    assert len(warned) == 2  # the tower's two layers, once each; the projector trains


def test_the_auxiliary_loss_is_the_mean_over_a_tower(model_and_batch):
    """LibMoE's: balance and z averaged over the layers of the vision tower, the projector's added; not L times that."""
    model, inputs = model_and_batch
    for over, divisor in (("mean", 4), ("sum", 1)):
        twin = upcycle(copy.deepcopy(model), balance_coef=0.1, z_coef=0.02, aux_over_layers=over).train()
        twin(**inputs)
        layers = moe_layers(twin)
        each = {name: 0.1 * layer.balance_loss + 0.02 * layer.z_loss for name, layer in layers.items()}
        expected = sum(loss / (divisor if "vision" in name else 1) for name, loss in each.items())
        torch.testing.assert_close(sum(layer.aux_loss for layer in layers.values()), expected)


def test_hyper_comes_back_from_its_trainable_parameters(model_and_batch):
    """What LLaVA's savers keep. Layers draw hypernetworks of their own, the same ones in every process."""
    model, inputs = model_and_batch
    saved = upcycle(copy.deepcopy(model), router="hyper").eval()
    with torch.no_grad():
        for layer in moe_layers(saved).values():
            layer.experts.w1.add_(0.1 * torch.randn_like(layer.experts.w1))  # experts that differ
    kept = {name: p.detach() for name, p in saved.named_parameters() if p.requires_grad}
    torch.manual_seed(1234)
    loaded = upcycle(copy.deepcopy(model), router="hyper").eval()
    assert not loaded.load_state_dict(kept, strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, saved(**inputs).logits)
    nets = torch.stack([layer.router.hypernet.w2.flatten()[:500] for layer in moe_layers(saved).values()])
    correlation = torch.corrcoef(nets) - torch.eye(len(nets))
    assert correlation.abs().max() < 5 / nets.shape[1] ** 0.5


def test_frozen_towers(model_and_batch):
    model, _ = model_and_batch
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="experts of 5 of 5 layers are frozen"):
        half = upcycle(copy.deepcopy(model))
    assert {p.requires_grad for layer in moe_layers(half).values() for p in layer.experts.parameters()} == {False}
    for trainable in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            swapped = upcycle(copy.deepcopy(model), trainable=trainable)
        assert {p.requires_grad for layer in moe_layers(swapped).values() for p in layer.parameters()} == {trainable}
        assert not any(p.requires_grad for p in swapped.lm_head.parameters())


def test_experts_of_another_library_are_not_upcycled_again():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8))
    for layer in [m for m in model.modules() if hasattr(m, "mlp")]:
        layer.mlp.experts = nn.ModuleList(copy.deepcopy(layer.mlp) for _ in range(2))
    with pytest.raises(ConfigError, match=r"mlp.experts.0 is an expert of a mixture already"):
        upcycle(model, targets="vision")


def test_siglips_pooling_head_stays_dense():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = upcycle(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)), targets="vision")
    assert len(moe_layers(model)) == 2
    assert not any("head" in name.split(".") for name in moe_layers(model))


def test_huggingface_llava_does_not_warn(model_and_batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upcycle(model_and_batch[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"router": "cosin"}, "unknown router 'cosin'", id="router"),
        pytest.param({"top_k": 5}, "top_k is 5 with num_experts 4", id="K>N"),
        pytest.param({"targets": ("text",)}, "unknown upcycle target 'text'", id="target"),
        pytest.param({"router_options": {"heat": 1}}, "no option heat", id="option"),
    ],
)
def test_bad_options_swap_nothing(model_and_batch, options, message):
    model, _ = model_and_batch
    with pytest.raises(ConfigError, match=message):
        upcycle(model, **options)
    assert not moe_layers(model)


def test_twice_and_nothing_to_swap(model_and_batch):
    model, _ = model_and_batch
    with pytest.raises(ConfigError, match="upcycled before"):
        upcycle(upcycle(model))
    with pytest.raises(ConfigError, match="Linear: it has no vision MLP"):
        upcycle(nn.Linear(2, 2))


def test_from_pretrained_of_a_class_that_upcycles(tmp_path):
    """It builds the model on the meta device and fills in what the file holds; memory that nobody wrote is NaN here."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    class Upcycled(CLIPVisionModel):
        def __init__(self, config):
            super().__init__(config)
            for layer in [m for m in self.modules() if hasattr(m, "mlp")]:
                layer.mlp = MoE.from_dense(layer.mlp, num_experts=2, top_k=2)

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    saved = Upcycled(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    saved.save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory
    try:
        loaded = Upcycled.from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    images, gradients = torch.rand(2, 3, 8, 8), []
    for model in (saved, loaded):
        model.train()
        model(images).pooler_output.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


# ---------------------------------------------------------------------------------------------------------------------
# The training loop knows nothing


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def explicit_gradients(model, batches, divisor):
    """The truth: every layer's auxiliary loss added to the loss by hand, through the graph."""
    losses = {}

    def keep(layer, _inputs, output):
        losses[layer] = output[1]
        return output[0]

    hooks = [layer.register_forward_hook(keep) for layer in moe_layers(model).values()]
    for layer in moe_layers(model).values():
        layer.aux_mode = "return"
    for inputs in batches:
        losses.clear()
        loss = model(**inputs).loss
        # vision_feature_layer -2: the last vision layer's output is unused, its aux loss must not train anything
        used = [value for layer, value in losses.items() if layer is not last_vision_layer(model)]
        ((loss + sum(used)) / divisor).backward()
    for hook in hooks:
        hook.remove()
    return gradients(model)


def last_vision_layer(model):
    return [layer for name, layer in moe_layers(model).items() if "vision" in name][-1]


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_loss_backward_is_enough(model_and_batch, checkpointing):
    """Accumulation over 2 micro-batches, with activation checkpointing of both kinds, equals losses added by hand."""
    model, inputs = model_and_batch
    upcycle(model, balance_coef=0.5, z_coef=0.1).train()
    halves = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)]
    expected = explicit_gradients(copy.deepcopy(model), halves, 2)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    for half in halves:
        (model(**half).loss / 2).backward()
    actual = gradients(model)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_text_only_batch_reports_nothing_stale(model_and_batch):
    model, inputs = model_and_batch
    upcycle(model).train()
    model(**inputs)
    assert all(layer.balance_loss is not None for layer in moe_layers(model).values())
    text_only = {k: v for k, v in inputs.items() if k != "pixel_values"}
    image = getattr(model.config, "image_token_id", None) or model.config.image_token_index  # transformers 4.51
    text_only = {k: torch.where(v == image, 5, v) for k, v in text_only.items()}
    model(**text_only).loss.backward()
    assert all(layer.balance_loss is None for layer in moe_layers(model).values())


def test_aux_loss_disabled(model_and_batch):
    model, inputs = model_and_batch
    upcycle(model, balance_coef=100.0).train()
    with libmoe_fast.aux_loss_disabled(model):
        model(**inputs).loss.backward()
    quiet = gradients(model)
    model.zero_grad()
    for layer in moe_layers(model).values():
        layer.balance_coef = layer.z_coef = 0.0
    model(**inputs).loss.backward()
    torch.testing.assert_close(quiet, gradients(model))


def test_a_deep_copy_trains_on_its_own(model_and_batch):
    """Each backward has a scale of its own: the original's loss must not scale the copy's auxiliary losses."""
    model, inputs = model_and_batch
    upcycle(model).train()
    twin = copy.deepcopy(model)
    losses = [model(**inputs).loss, twin(**inputs).loss / 8]
    for loss in losses:
        loss.backward()
    expected = {name: grad / 8 for name, grad in gradients(model).items()}
    torch.testing.assert_close(gradients(twin), expected, rtol=1e-4, atol=1e-8)


def test_records_by_image(model_and_batch):
    model, inputs = model_and_batch
    upcycle(model, router="cosine", num_experts=6, top_k=3).eval()
    with libmoe_fast.record_routing(model) as recorder, torch.no_grad():
        model(**inputs)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    for name, (record,) in recorder.records.items():
        tokens = patches + ("vision_tower" in name and vision.model_type == "clip_vision_model")  # CLS
        assert record.index.shape == (2, tokens, 3), name


def test_the_no_grad_around_a_tower_is_lifted(dense, caplog):
    """As the original LLaVA writes it; a `with` inside of forward cannot be taken away, and the layers warn."""

    class CLIPVisionTower(nn.Module):
        def __init__(self, vision_model):
            super().__init__()
            self.vision_tower = vision_model

        @torch.no_grad()
        def forward(self, images):
            return self.vision_tower(images).last_hidden_state

    images = torch.randn(2, 3, 32, 32)
    tower = CLIPVisionTower(copy.deepcopy(dense[0].model.vision_tower))
    before = tower(images)
    assert not before.requires_grad
    frozen = upcycle(copy.deepcopy(tower), targets="vision", trainable=False)
    assert not frozen(images).requires_grad
    assert not caplog.records
    upcycle(tower, targets="vision")
    assert [record.message for record in caplog.records] == [
        "upcycle took @torch.no_grad() off the forward of the model (CLIPVisionTower), so that experts train"
    ]
    for model in (tower, copy.deepcopy(tower)):
        y = model.train()(images)
        torch.testing.assert_close(y, before, rtol=1e-3, atol=1e-4)
        y.sum().backward()
        assert all(layer.experts.w1.grad.any() for layer in moe_layers(model).values())
