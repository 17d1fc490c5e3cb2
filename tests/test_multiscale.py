"""S2 against a plain construction of it, and through everything a model goes through."""

import copy

import pytest
import torch
import torch.nn.functional as F

from libmoe_fast import ConfigError, load_model, moe_layers, record_routing, save_model, upcycle, use_scales
from libmoe_fast.analysis.counter import record_images
from libmoe_fast.multiscale import from_tiles, scales_of, to_tiles
from libmoe_fast.train.tiny import tiny_llava

SIZES = {"dim": 16, "vision_layers": 3, "text_layers": 1}


def llava(kind="clip", scales=(1, 3)):
    model, processor = tiny_llava(kind, **SIZES)
    torch.manual_seed(1)
    return use_scales(model, scales).eval(), processor


def batch(processor, images=2):
    ids = processor.tokenizer(["<image>" * 16 + " odd or even?"] * images, return_tensors="pt")["input_ids"]
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def plain_features(model, pixels, scales, *, class_tokens):
    """Image by image, tile by tile, in loops: what the projector must read."""
    tower = tiny_llava("clip" if class_tokens else "siglip", **SIZES)[0].model.vision_tower.eval()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    rows = []
    for image in pixels:
        parts = []
        for scale in scales:
            size = 32 * scale
            large = F.interpolate(image[None], size=(size, size), mode="bicubic") if scale > 1 else image[None]
            grid = torch.zeros(4 * scale, 4 * scale, 16)
            for i in range(scale):
                for j in range(scale):
                    tile = large[..., 32 * i : 32 * (i + 1), 32 * j : 32 * (j + 1)]
                    states = tower(tile, output_hidden_states=True).hidden_states[-2][0, class_tokens:]
                    grid[4 * i : 4 * (i + 1), 4 * j : 4 * (j + 1)] = states.view(4, 4, 16)
            pooled = F.interpolate(grid.permute(2, 0, 1)[None], size=(4, 4), mode="area")[0]  # [D, h, w]
            parts.append(pooled.permute(1, 2, 0).reshape(16, 16))
        rows.append(torch.cat(parts, dim=-1))
    return torch.stack(rows)  # [B, P, D * scales]


@pytest.mark.parametrize("scales", [(1, 3), (1, 2, 3)], ids=["LibMoE's", "three"])
@pytest.mark.parametrize(("kind", "class_tokens"), [("clip", 1), ("siglip", 0)])  # a class token, or none
def test_equals_a_plain_construction(kind, class_tokens, scales):
    model, processor = llava(kind, scales)
    inputs = batch(processor)
    read = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        expected = plain_features(model, inputs["pixel_values"], scales, class_tokens=class_tokens)
    assert read[0].shape == (2, 16, 16 * len(scales))
    torch.testing.assert_close(read[0], expected, rtol=1e-5, atol=1e-5)


def test_tiles_are_cut_and_put_together_again():
    """An image of constant blocks: every tile is one block, and its features land where the block was."""
    blocks = torch.arange(9.0).view(1, 1, 3, 3)
    tiles = to_tiles(F.interpolate(blocks, size=(96, 96), mode="nearest").expand(2, 3, 96, 96), 1)
    assert torch.equal(tiles[0, 0, ::32, ::32], blocks[0, 0])
    features = torch.arange(9.0).view(9, 1, 1).expand(9, 9, 2)  # tile t has features t everywhere; 3 x 3 patches
    merged = from_tiles(features, 3)
    assert torch.equal(merged[0, :, 0], torch.arange(9.0))


@pytest.mark.parametrize("router", [None, "cosine"], ids=["dense", "swapped"])
@pytest.mark.parametrize("writer", ["save_model", "save_pretrained"])
def test_saved_and_loaded(router, writer, tmp_path):
    model, processor = llava()
    if router:
        upcycle(model, router=router)
    if writer == "save_model":
        save_model(model, tmp_path / "m", processor=processor)
    else:
        model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert scales_of(loaded) == (1, 3)
    assert type(loaded) is type(model)
    inputs = batch(processor)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
        assert torch.equal(copy.deepcopy(loaded)(**inputs).logits, model(**inputs).logits)


def test_stock_transformers_refuses_it(tmp_path):
    """It would run at one scale; the projector's shape keeps it from doing so silently."""
    model, _ = llava()
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(RuntimeError, match=r"mismatch|size"):
        type(model).from_pretrained(tmp_path / "m")


def test_upcycled_equals_dense_and_records_each_scale():
    model, processor = llava()
    inputs = batch(processor)
    with torch.no_grad():
        dense = model(**inputs).logits
        upcycle(model, num_experts=3)
        with record_routing(model) as recorder:
            upcycled = model(**inputs).logits
    torch.testing.assert_close(upcycled, dense, rtol=1e-4, atol=1e-4)
    for name, records in recorder.records.items():
        shapes = [tuple(routing.index.shape[:2]) for routing in records]
        assert shapes == ([(2, 17), (18, 17)] if "vision" in name else [(2, 16)]), name


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_auxiliary_loss_is_the_mean_over_scales(checkpointing):
    """LibMoE: mean over a tower's layers, and over its passes; read back the same whether recomputed or not."""
    model, processor = llava()
    upcycle(model, num_experts=3, balance_coef=1.0, z_coef=0.5)
    layers = {name: layer for name, layer in moe_layers(model).items() if "vision" in name}
    inputs = batch(processor)
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, *_, name=name: seen[name].append(module.statistics()))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, layer in layers.items():
        assert layer.aux_weight == pytest.approx(1 / (len(layers) * 2))
        own, tiles = seen[name][:2]
        for value, first, second in zip(layer.statistics(), own, tiles, strict=True):
            torch.testing.assert_close(value, (first + second) / 2)


def test_gradients_reach_all_scales():
    model, processor = llava()
    upcycle(model, num_experts=3)
    inputs = batch(processor)
    pixels = inputs["pixel_values"].requires_grad_()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, layer in moe_layers(model).items():
        if "layers.2" not in name:  # the projector reads what goes into the tower's last layer
            assert layer.router.weight.grad.abs().max() > 0, name
    assert (pixels.grad != 0).float().mean() > 0.9
    weight = model.model.multi_modal_projector.experts.w1.grad  # [N, H, 2 D]
    assert all(half.abs().max() > 0 for half in weight.chunk(2, dim=-1))


def test_what_counts_is_the_image_at_its_own_size():
    model, processor = llava()
    upcycle(model, num_experts=3)
    with torch.no_grad(), record_images(model, 2) as records:
        model.generate(**batch(processor), max_new_tokens=2, do_sample=False)
    for record in records:
        chosen = [int(counts.sum()) for counts in record.counts]
        assert chosen == [(17 if "vision" in name else 16) * 2 for name in moe_layers(model)]


@pytest.mark.parametrize("scales", [(), (3,), (1, 1), (3, 1), (1, 2.0), (1, True), "13", (1, 99), 3])
def test_other_scales_are_refused(scales):
    model, _ = tiny_llava("clip", **SIZES)
    with pytest.raises(ConfigError, match="rising whole numbers"):
        use_scales(model, scales)


def test_it_comes_once_and_before_upcycle():
    model, _ = llava()
    with pytest.raises(ConfigError, match="already"):
        use_scales(model, (1, 2))
    swapped = upcycle(tiny_llava("clip", **SIZES)[0], num_experts=2)
    with pytest.raises(ConfigError, match=r"before upcycle|experts"):
        use_scales(swapped, (1, 3))
    with pytest.raises(ConfigError, match="no vision_tower"):
        use_scales(torch.nn.Linear(2, 2), (1, 3))


def test_one_scale_changes_nothing():
    model, _ = tiny_llava("clip", **SIZES)
    before = model.state_dict().keys()
    assert use_scales(model, (1,)) is model
    assert model.state_dict().keys() == before
    assert not model.model.vision_tower._forward_hooks
    assert scales_of(model) == (1,)
