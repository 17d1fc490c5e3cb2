"""Building models: from parts, from checkpoints, and refusing what is not one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from libmoe_fast import load_model, moe_layers, save_model
from libmoe_fast.errors import CheckpointError, ConfigError
from libmoe_fast.train.config import ModelConfig
from libmoe_fast.train.model import build_model, image_tokens
from libmoe_fast.train.tiny import tiny_llava

SIZES = {"dim": 16, "vision_layers": 2, "text_layers": 1}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model, processor = tiny_llava(**SIZES)
    folder = tmp_path_factory.mktemp("dense")
    save_model(model, folder, processor=processor)
    return folder


def parts(kind: str, folder):
    """A tiny vision tower and language model in folders of their own, the tokenizer without <image>."""
    from transformers import CLIPVisionModel, Phi3ForCausalLM, PreTrainedTokenizerFast, SiglipVisionModel

    llava, processor = tiny_llava(kind, **SIZES)
    vision = (CLIPVisionModel if kind == "clip" else SiglipVisionModel)(llava.config.vision_config)
    text = Phi3ForCausalLM(llava.config.text_config)
    backend = processor.tokenizer.backend_tokenizer.to_str().replace("<image>", "<unused>")
    vision.save_pretrained(folder / "vision")
    processor.image_processor.save_pretrained(folder / "vision")
    text.save_pretrained(folder / "text")
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder / "text")
    return vision, text, ModelConfig(vision_tower=str(folder / "vision"), language_model=str(folder / "text"))


@pytest.mark.parametrize(
    ("kind", "strategy", "extra"),
    [("clip", "default", 1), ("siglip", "full", 0)],  # CLIP's class token is dropped; SigLIP has none
)
def test_composing_a_llava(kind, strategy, extra, tmp_path):
    vision, text, config = parts(kind, tmp_path)
    model, processor = build_model(config, dtype=torch.float32)
    assert model.config.vision_feature_select_strategy == processor.vision_feature_select_strategy == strategy
    assert processor.num_additional_image_tokens == extra
    assert image_tokens(model) == 16
    stored = dict(vision.named_parameters())
    for name, parameter in model.model.vision_tower.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    rows = text.lm_head.weight.shape[0]
    assert torch.equal(model.lm_head.weight[:rows], text.lm_head.weight)
    assert model.lm_head.weight.shape[0] == len(processor.tokenizer) == rows + 1  # <image> is new
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"multi_modal_projector"}  # stage 1
    inputs = processor(images=_image(), text="<image>\nHi", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    save_model(model, tmp_path / "llava", processor=processor)
    again, _ = build_model(ModelConfig(path=str(tmp_path / "llava"), stage=2), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_answers_end_where_training_ended_them(tmp_path):
    """Phi-3's folder: config and generation_config.json end at other tokens; an answer was taught to end at <|end|>."""
    _, _, config = parts("clip", tmp_path)
    tokens = json.loads((tmp_path / "text" / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    for name, eos in {"config.json": ids["</s>"], "generation_config.json": [ids["</s>"], ids["<|user|>"]]}.items():
        file = tmp_path / "text" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": eos, "pad_token_id": ids["<pad>"]}))
    model, processor = build_model(config, dtype=torch.float32)
    save_model(model, tmp_path / "llava", processor=processor)
    again, _ = build_model(ModelConfig(path=str(tmp_path / "llava"), stage=3), dtype=torch.float32)
    save_model(again, tmp_path / "moe", processor=processor)
    for loaded in (load_model(tmp_path / "llava"), load_model(tmp_path / "moe")):
        assert loaded.generation_config.eos_token_id == [ids["</s>"], ids["<|user|>"], ids["<|end|>"]]
        assert loaded.generation_config.pad_token_id == ids["<pad>"]
    assert processor.tokenizer.eos_token == "<|end|>"


def _image():
    from PIL import Image

    return Image.new("RGB", (32, 32), "green")


def test_the_projector_follows_the_seed(tmp_path):
    _, _, config = parts("clip", tmp_path)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_model(config, dtype=torch.float32)[0].model.multi_modal_projector.linear_1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_composed_llava_of_several_scales(tmp_path):
    _, _, config = parts("siglip", tmp_path)
    config.scales = [1, 3]
    model, processor = build_model(config, dtype=torch.bfloat16)
    assert model.model.multi_modal_projector.linear_1.weight.shape == (16, 32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [n for n, p in model.named_parameters() if p.requires_grad and "projector" not in n] == []
    save_model(model, tmp_path / "llava", processor=processor)
    again, _ = build_model(ModelConfig(path=str(tmp_path / "llava"), stage=3), dtype=torch.float32)
    assert moe_layers(again)["model.multi_modal_projector"].experts.w1.shape == (4, 16, 32)


def test_stages_train_what_they_should(dense):
    frozen = {}
    for stage in (1, 2, 3):
        model, _ = build_model(ModelConfig(path=str(dense), stage=stage, router="hyper"), dtype=torch.float32)
        frozen[stage] = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert bool(moe_layers(model)) == (stage == 3)
    assert any("vision_tower" in name for name in frozen[1])
    assert frozen[2] == set()
    assert all("hypernet" in name for name in frozen[3])  # frozen by the router itself
    model, _ = build_model(ModelConfig(path=str(dense), stage=3, targets=["projector"]), dtype=torch.bfloat16)
    assert list(moe_layers(model)) == ["model.multi_modal_projector"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_upcycling_twice_is_refused(dense, tmp_path):
    model, processor = build_model(ModelConfig(path=str(dense), stage=3), dtype=torch.float32)
    save_model(model, tmp_path / "moe", processor=processor)
    with pytest.raises(ConfigError, match="has experts already"):
        build_model(ModelConfig(path=str(tmp_path / "moe"), stage=3), dtype=torch.float32)


def test_truncated_checkpoint(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut"):
        build_model(ModelConfig(path=str(tmp_path / "cut"), stage=2), dtype=torch.float32)


def test_checkpoint_with_a_missing_weight(dense, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(dense, tmp_path / "holes")
    weights = load_file(dense / "model.safetensors")
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    del weights[name]
    save_file(weights, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"linear_1\.weight"):
        build_model(ModelConfig(path=str(tmp_path / "holes"), stage=2), dtype=torch.float32)


def test_foreign_folders(dense, tmp_path):
    _, _, config = parts("clip", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a 'phi3' model; expected 'llava'"):
        build_model(ModelConfig(path=config.language_model), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"holds a 'phi3' model; expected a CLIP or SigLIP"):
        build_model(
            ModelConfig(vision_tower=config.language_model, language_model=config.language_model), dtype=torch.float32
        )
    with pytest.raises(CheckpointError, match=r"none is not a model folder: config.json is missing"):
        build_model(ModelConfig(path=str(tmp_path / "none")), dtype=torch.float32)
    (tmp_path / "text" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is missing or broken"):
        build_model(config, dtype=torch.float32)
