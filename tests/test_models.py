"""Targets in Hugging Face's models: tiny ones of the real classes, made from configurations.

Each row: right after the swap the tower computes what it did, routers and experts learn, and a saved layer comes back;
or one error says what stands there instead.
"""

import copy

import pytest
import torch
import transformers
from torch import nn

import libmoe_fast
from libmoe_fast import ConfigError, moe_layers, register_mlp, upcycle
from libmoe_fast.experts import ADAPTERS

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MROPE_TEXT = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
PATCHES = {"image_size": 16, "patch_size": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    **PATCHES,
}


def make(name: str, **config) -> nn.Module:
    """A model of a class, from the configuration of that family; skips where this transformers has neither."""
    torch.manual_seed(0)
    try:
        cls = getattr(transformers, name)
        made = cls(cls.config_class(**config))
    except AttributeError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return made.eval()


def composed(name: str, *, vision: dict, text: str = "llama", **more) -> nn.Module:
    text_config = {"model_type": text, **TEXT}
    return make(name, vision_config=vision, text_config=text_config, **more)


CLIP, SIGLIP = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 8, "in_channels": 3}
MODELS = {
    "CLIP": lambda: make("CLIPVisionModel", **VISION),
    "SigLIP": lambda: make("SiglipVisionModel", **VISION),
    "DINOv2": lambda: make("Dinov2Model", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, **PATCHES),
    "LLaVA": lambda: composed("LlavaForConditionalGeneration", vision=CLIP),
    "LLaVA-NeXT": lambda: composed("LlavaNextForConditionalGeneration", vision=CLIP, image_grid_pinpoints=[[16, 16]]),
    "LLaVA-OneVision": lambda: composed("LlavaOnevisionForConditionalGeneration", vision=SIGLIP, text="qwen2"),
    "VipLLaVA": lambda: composed("VipLlavaForConditionalGeneration", vision=CLIP, vision_feature_layers=[-2, -1]),
    "PaliGemma": lambda: composed("PaliGemmaForConditionalGeneration", vision=SIGLIP, text="gemma", projection_dim=32),
    "Idefics3": lambda: composed("Idefics3ForConditionalGeneration", vision={**VISION}, scale_factor=2),
    "Qwen2.5-VL": lambda: make(
        "Qwen2_5_VLForConditionalGeneration",
        text_config=MROPE_TEXT,
        vision_config={**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32},
    ),
    "InternVL": lambda: composed("InternVLForConditionalGeneration", vision=VISION, text="qwen2"),
    "Qwen2-VL": lambda: make(
        "Qwen2VLForConditionalGeneration",
        text_config=MROPE_TEXT,
        vision_config={**QWEN, "hidden_size": 32, "embed_dim": 32, "mlp_ratio": 2},
    ),
    "Qwen3-VL": lambda: make(
        "Qwen3VLForConditionalGeneration",
        text_config={**TEXT, "head_dim": 16},
        vision_config={
            **QWEN,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    ),
    "Gemma 3": lambda: make(
        "Gemma3ForConditionalGeneration",
        vision_config=SIGLIP,
        text_config={**TEXT, "head_dim": 16},
        mm_tokens_per_image=4,
    ),
    "SmolVLM": lambda: composed("SmolVLMForConditionalGeneration", vision={**VISION}, scale_factor=1),
    "Mistral 3": lambda: composed(
        "Mistral3ForConditionalGeneration",
        vision={"model_type": "pixtral", **VISION},
        text="mistral",
        spatial_merge_size=1,
    ),
    "SigLIP 2": lambda: make(
        "Siglip2VisionModel", **{name: size for name, size in VISION.items() if name != "image_size"}, num_patches=4
    ),
    "ViT": lambda: make("ViTModel", **VISION),
}
# Model, target -> how many MLPs it has there, or what the error says.
TABLE = [
    ("CLIP", "vision", 3),
    ("SigLIP", "vision", 3),  # the pooling head's MLP stays dense
    ("DINOv2", "vision", 3),
    ("LLaVA", "vision", 3),
    ("LLaVA", "projector", 1),
    ("LLaVA", "language", 2),
    ("LLaVA", "vision[::2]", 2),
    ("LLaVA", "vision[-1:]", 1),
    ("LLaVA", "*vision_tower*.layers.[01].mlp", 2),
    ("LLaVA", "vision[3:]", r"'vision\[3:\]' takes none"),
    ("LLaVA", "*.mpl", "no module is called"),
    ("LLaVA-NeXT", "vision", 3),
    ("LLaVA-NeXT", "projector", 1),
    ("LLaVA-NeXT", "language", 2),
    ("LLaVA-OneVision", "vision", 3),
    ("LLaVA-OneVision", "projector", 1),
    ("LLaVA-OneVision", "language", 2),
    ("VipLLaVA", "vision", 3),
    ("VipLLaVA", "language", 2),
    ("VipLLaVA", "projector", 1),  # after its layer norm
    ("PaliGemma", "vision", 3),
    ("PaliGemma", "language", 2),
    ("PaliGemma", "projector", r"PaliGemmaMultiModalProjector \(linear\)"),
    ("Idefics3", "vision", 3),
    ("Idefics3", "language", 2),
    ("Idefics3", "projector", r"Idefics3SimpleMLP \(proj\)"),
    ("Qwen2.5-VL", "vision", 2),  # gated
    ("Qwen2.5-VL", "projector", 1),  # the merger's
    ("Qwen2.5-VL", "language", 2),
    ("InternVL", "vision", 3),
    ("InternVL", "language", 2),
    ("InternVL", "projector", 1),  # after its layer norm
    ("Qwen2-VL", "vision", 2),
    ("Qwen2-VL", "projector", 1),
    ("Qwen2-VL", "language", 2),
    ("Qwen3-VL", "vision", 2),
    ("Qwen3-VL", "language", 2),
    ("Qwen3-VL", "projector", r"Qwen3VLVisionPatchMerger \(norm, linear_fc1"),  # it merges patches after its norm
    ("Gemma 3", "vision", 3),
    ("Gemma 3", "language", 2),
    ("Gemma 3", "projector", r"multi_modal_projector there is no linear layer"),
    ("SmolVLM", "vision", 3),
    ("SmolVLM", "language", 2),
    ("SmolVLM", "projector", r"SmolVLMSimpleMLP \(proj\)"),
    ("Mistral 3", "vision", 3),  # Pixtral's, gated
    ("Mistral 3", "language", 2),
    ("Mistral 3", "projector", r"Mistral3MultiModalProjector \(norm, patch_merger"),  # it merges patches after its norm
    ("SigLIP 2", "vision", 3),
    ("ViT", "vision", 3),
]


@pytest.fixture(scope="module")
def model_of():
    made = {}

    def get(name: str) -> nn.Module:
        if name not in made:
            made[name] = MODELS[name]()
        return copy.deepcopy(made[name])

    return get


@pytest.mark.parametrize(("name", "target", "expected"), TABLE, ids=lambda value: str(value)[:24])
def test_targets(model_of, name, target, expected, tmp_path):
    model, dense = model_of(name), model_of(name)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            upcycle(model, targets=target)
        assert not moe_layers(model)
        return
    upcycle(model, targets=target, num_experts=3)
    layers = moe_layers(model)
    assert len(layers) == expected
    for path, layer in layers.items():
        mlp = dense.get_submodule(path)
        x = torch.randn(2, 5, layer.experts.in_features)
        torch.testing.assert_close(layer(x), mlp(x), rtol=1e-4, atol=1e-5)
        layer.train()(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in (layer.router.weight, layer.experts.w1))
    libmoe_fast.save_model(model, tmp_path / "saved")
    loaded = libmoe_fast.load_weights(dense, tmp_path / "saved")
    for (key, mine), theirs in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key


def test_a_model_called_vision_is_no_tower(model_of):
    """Its language model's MLPs are not the tower's."""
    model = model_of("Qwen2.5-VL")
    model.__class__ = type("MyVisionLanguageModel", (type(model),), {})
    model.model.__class__ = type("MyVisionModel", (type(model.model),), {})
    upcycle(model, targets="vision")
    assert len(moe_layers(model)) == 2
    assert all(".visual." in name for name in moe_layers(model))


def test_a_function_as_target(model_of):
    model = upcycle(model_of("LLaVA"), targets=lambda name, module: name.endswith("layers.1.mlp"))
    assert sorted(name.rpartition(".layers")[2] for name in moe_layers(model)) == [".1.mlp", ".1.mlp"]


class Odd(nn.Module):
    """An MLP under names of its own, its two matrices transposed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(12, 8))

    def forward(self, x):
        return torch.relu(x @ self.a) @ self.b


def test_an_mlp_with_an_adapter():
    model = nn.Sequential(Odd(), Odd())
    with pytest.raises(ConfigError, match="Odd"):
        upcycle(model, targets="?")
    try:
        register_mlp("Odd")(lambda mlp: libmoe_fast.DenseParts(mlp.a.T, None, mlp.b.T, None, "relu", False))
        x = torch.randn(3, 8)
        before = model(x)
        torch.testing.assert_close(upcycle(model, targets="?")(x), before)
        register_mlp("Odd")(lambda mlp: libmoe_fast.DenseParts(mlp.a.T, None, mlp.b.T, None, "silu", False))
        with pytest.raises(ConfigError, match="computes something else"):
            upcycle(nn.Sequential(Odd()), targets="?")
    finally:
        ADAPTERS.pop("Odd", None)
