"""Files in the structure of published checkpoints, written here by hand, against the models that they came from."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from libmoe_fast import CheckpointError, ConfigError, load_model, moe_layers, save_model, upcycle, use_scales
from libmoe_fast.checkpoint import FORMAT
from libmoe_fast.convert import convert
from libmoe_fast.multiscale import scales_of
from libmoe_fast.train.config import ModelConfig
from libmoe_fast.train.model import build_model
from libmoe_fast.train.tiny import tiny_llava

SIZES = {"dim": 16, "vision_layers": 2, "text_layers": 1}
PUBLISHED = {
    "smoe": ("smoe", {}),
    "smoe_cosinegating": ("cosine", {}),
    "smoe_perturbed": ("perturbed_cosine", {}),
    "smoe_sigmoidgating": ("sigmoid", {}),
    "hyperrouter": ("hyper", {}),
}
TEXT_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def original(request, tmp_path_factory):
    """A dense LLaVA of scales 1 and 3, its processor, and the folder of its vision tower."""
    model, processor = tiny_llava(request.param, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        use_scales(model, (1, 3))
    folder = tmp_path_factory.mktemp("vision")
    tower = copy.deepcopy(model.model.vision_tower)
    tower._forward_hooks.clear()
    tower.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return model.eval(), processor, folder


def logits(model, processor):
    ids = processor.tokenizer("<image>" * 16 + " odd or even?", return_tensors="pt")["input_ids"]
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


def dense_names(model):
    """LibMoE's names of a dense model's tensors, spelled out by hand from its modules."""
    tower, projector, inner = model.model.vision_tower, model.model.multi_modal_projector, model.model
    tower = getattr(tower, "vision_model", tower)
    state = {f"model.{name}": tensor for name, tensor in inner.language_model.state_dict().items()}
    state["lm_head.weight"] = model.lm_head.weight
    for name, tensor in tower.state_dict().items():
        if "post_layernorm" not in name:  # commented out in their towers
            state[f"model.vision_tower.vision_model.{name}"] = tensor
    if isinstance(getattr(projector, "linear_1", None), nn.Linear):
        for number, layer in ((0, projector.linear_1), (2, projector.linear_2)):
            state[f"model.mm_projector.{number}.weight"] = layer.weight
            state[f"model.mm_projector.{number}.bias"] = layer.bias
    return state


def moe_names(model):
    """The same with experts: one tensor per expert, the gate as nn.Linear or as a hypernetwork."""
    state = dense_names(model)
    for name in [name for name in state if "vision_tower" in name and ".mlp." in name]:
        del state[name]
    for name, layer in moe_layers(model).items():
        projector = "projector" in name
        number = None if projector else int(name.split("layers.")[1].split(".")[0])
        place = "model.mm_projector" if projector else f"model.vision_tower.vision_model.encoder.layers.{number}"
        first, second = ("0", "2") if projector else ("fc1", "fc2")
        for e in range(layer.experts.num_experts):
            expert = f"{place}.moelayer.experts.{e}"
            state[f"{expert}.{first}.weight"], state[f"{expert}.{first}.bias"] = (
                layer.experts.w1[e],
                layer.experts.bias1[e],
            )
            state[f"{expert}.{second}.weight"] = layer.experts.w2[e]
            state[f"{expert}.{second}.bias"] = layer.experts.bias2[e]
        if layer.router_name == "hyper":
            net = layer.router.hypernet
            state[f"{place}.moelayer.hyper_embedding"] = layer.router.embedding[None]
            state[f"{place}.moelayer.hypernet.0.weight"], state[f"{place}.moelayer.hypernet.0.bias"] = net.w1, net.b1
            state[f"{place}.moelayer.hypernet.2.weight"], state[f"{place}.moelayer.hypernet.2.bias"] = net.w2, net.b2
            state[f"{place}.moelayer.gate.weight"] = torch.zeros(layer.experts.num_experts, layer.experts.in_features)
        elif layer.router_name == "xmoe":  # its base class makes a gate that it never reads
            state[f"{place}.moelayer.expert_embeddings"] = layer.router.weight
            state[f"{place}.moelayer.inp_reduction.weight"] = layer.router.projection.weight
            state[f"{place}.moelayer.gate.weight"] = torch.zeros(layer.experts.num_experts, layer.experts.in_features)
        else:
            state[f"{place}.moelayer.gate.weight"] = layer.router.weight
            if layer.router.bias is not None:
                state[f"{place}.moelayer.gate.bias"] = layer.router.bias
        if layer.router_name == "moe_plus_plus" and layer.router.free:  # after the experts a zero, then a constant
            slots, constant = len(layer.router.weight), layer.experts.num_experts + 1
            state[f"{place}.moelayer.gate_transform.weight"] = torch.zeros(slots, slots)
            state[f"{place}.moelayer.experts.{constant}.constant"] = layer.router.constant[0]
            state[f"{place}.moelayer.experts.{constant}.wg.weight"] = layer.router.mix[0]
    return state


def write(folder, model, processor, state, *, shards=1, **config):
    folder.mkdir()
    text = model.config.text_config.to_dict()
    written = {**text, "model_type": "llava_phi", "architectures": ["LlavaPhiForCausalLM"], "scales": [1, 3]}
    written |= {"mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip", "image_aspect_ratio": "pad"} | config
    (folder / "config.json").write_text(json.dumps(written))
    names = list(state)
    for shard in range(shards):
        part = {name: state[name].detach().clone() for name in names[shard::shards]}
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / name)
    processor.tokenizer.save_pretrained(folder)
    return folder


def away_from_their_start(model):
    generator = torch.Generator().manual_seed(5)
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "hypernet" in n)):
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
    return model


def without_pre_layer_norm(model):
    for module in list(model.modules()):
        if hasattr(module, "pre_layrnorm"):
            module.pre_layrnorm = nn.Identity()
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_libmoes_experts(original, name, tmp_path):
    """v1.1, all routers, in shards: what the tower's first layer norm holds is never used there."""
    dense, processor, vision = original
    router, options = PUBLISHED[name]
    model = away_from_their_start(upcycle(copy.deepcopy(dense), router=router, router_options=options, num_experts=3))
    shape = {"moe_name": name, "num_experts": 3, "num_selected": 2}
    source = write(tmp_path / "theirs", model, processor, moe_names(model), shards=3, **shape)
    report = convert(source, tmp_path / "ours", version="v1.1", vision_tower=vision)
    converted = load_model(tmp_path / "ours")
    assert torch.equal(logits(converted, processor), logits(without_pre_layer_norm(model), processor))
    assert scales_of(converted) == (1, 3)
    assert {layer.router_name for layer in moe_layers(converted).values()} == {router}
    clip = "clip" in type(dense.model.vision_tower).__name__.lower()
    assert ("pre_layrnorm" in str(report)) == clip
    assert ("generated by the hypernetwork" in str(report)) == (router == "hyper")
    # And back: equal names, equal tensors, but for what was left out.
    convert(tmp_path / "ours", tmp_path / "back", to="libmoe", version="v1.1")
    written, back = moe_names(model), load_file(tmp_path / "back" / "model.safetensors")
    unread = {n for n in {*written, *back} if "pre_layrnorm" in n or "post_layernorm" in n}
    unread |= {n for n in written if router == "hyper" and ".gate." in n}
    assert back.keys() - unread == written.keys() - unread
    for key in back.keys() - unread:
        assert torch.equal(back[key], written[key]), key
    save_model(converted, tmp_path / "again", processor=processor)
    assert torch.equal(logits(load_model(tmp_path / "again"), processor), logits(converted, processor))


def test_v2_calls_the_first_layer_norm_and_normalises_sigmoids_by_their_sum(original, tmp_path):
    dense, processor, vision = original
    model = upcycle(copy.deepcopy(dense), router="sigmoid", router_options={"normalize": "sum"}, num_experts=3)
    away_from_their_start(model)
    for layer in moe_layers(model).values():
        layer.router.bias.data.zero_()  # v2's gate has none
    state = {name: tensor for name, tensor in moe_names(model).items() if "gate.bias" not in name}
    shape = {"moe_name": "smoe_sigmoidgating", "num_experts": 3, "num_selected": 2}
    source = write(tmp_path / "theirs", model, processor, state, **shape)
    convert(source, tmp_path / "ours", version="v2", vision_tower=vision)
    assert torch.equal(logits(load_model(tmp_path / "ours"), processor), logits(model, processor))


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("xmoe", "xmoe"),
        ("smoe_share", "shared_v2"),
        ("smoe_sharev3", "shared_v3"),
        ("smoe_tcmoe", "tc_moe"),
        ("smoe_plus_plus", "moe_plus_plus"),
    ],
)
def test_the_routers_of_v2(original, name, router, tmp_path):
    """A shared expert is the last of theirs, as of ours; what XMoE and MoE++ never read is left out, and not written
    back."""
    dense, processor, vision = original
    model = away_from_their_start(upcycle(copy.deepcopy(dense), router=router, num_experts=4, top_k=3))
    written = moe_names(model)
    shape = {"moe_name": name, "num_experts": 4, "num_selected": 3}
    source = write(tmp_path / "theirs", model, processor, written, **shape)
    report = convert(source, tmp_path / "ours", version="v2", vision_tower=vision)
    converted = load_model(tmp_path / "ours")
    assert torch.equal(logits(converted, processor), logits(model, processor))
    assert ("XMoE never reads it" in str(report)) == (name == "xmoe")
    assert ("MoE++ never reads it" in str(report)) == (name == "smoe_plus_plus")
    convert(tmp_path / "ours", tmp_path / "back", to="libmoe", version="v2")
    back = load_file(tmp_path / "back" / "model.safetensors")
    never_read = {"xmoe": ".gate.", "smoe_plus_plus": ".gate_transform."}.get(name, "post_layernorm")
    unread = {n for n in {*written, *back} if "post_layernorm" in n or never_read in n}
    assert back.keys() - unread == written.keys() - unread
    assert all(torch.equal(back[key], written[key]) for key in back.keys() - unread)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["moe_name"] == name


def test_dense_models_are_what_stage_3_takes(original, tmp_path):
    """LibMoE's stage 2: the language model in one file, tower and projector in .bin files beside it."""
    dense, processor, vision = original
    model = away_from_their_start(copy.deepcopy(dense))
    state = dense_names(model)
    parts = {
        part: {n: t for n, t in state.items() if f"model.{part}." in n} for part in ("mm_projector", "vision_tower")
    }
    rest = {n: t for n, t in state.items() if n not in parts["mm_projector"] and n not in parts["vision_tower"]}
    source = write(tmp_path / "pft", model, processor, rest)
    torch.save(parts["mm_projector"], source / "mm_projector.bin")
    torch.save(
        {n.removeprefix("model.vision_tower."): t for n, t in parts["vision_tower"].items()}, source / "clip.bin"
    )
    convert(source, tmp_path / "dense", vision_tower=vision)
    assert torch.equal(logits(load_model(tmp_path / "dense"), processor), logits(model, processor))
    config = ModelConfig(path=str(tmp_path / "dense"), stage=3, router="cosine")
    upcycled, own = build_model(config, dtype=torch.float32)
    assert len(moe_layers(upcycled)) == 3
    torch.testing.assert_close(logits(upcycled, own), logits(model, processor), rtol=1e-4, atol=1e-4)
    assert getattr(upcycled.config, FORMAT) == {"chat_template": "phi3", "image_aspect": "pad"}


def test_a_llava_without_its_tower_takes_the_one_named(original, tmp_path):
    """LLaVA v1.5's files: one scale, tower and image processor come from their own folder."""
    _, processor, vision = original
    kind = json.loads((vision / "config.json").read_text())["model_type"]
    model = tiny_llava(kind.partition("_")[0], **SIZES)[0]  # the same seed, the same tower
    state = {name: tensor for name, tensor in dense_names(model).items() if "vision_tower" not in name}
    source = write(tmp_path / "llava", model, processor, state, scales=[1])
    assert "taken from" in str(convert(source, tmp_path / "dense", vision_tower=vision))
    assert torch.equal(logits(load_model(tmp_path / "dense"), processor), logits(model, processor))


def test_image_tokens_get_rows_where_the_vocabulary_has_none(original, tmp_path):
    dense, processor, vision = original
    state = dense_names(dense)
    rows = state["model.embed_tokens.weight"].shape[0] - 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:rows]
    source = write(tmp_path / "theirs", dense, processor, state, vocab_size=rows)
    convert(source, tmp_path / "dense", vision_tower=vision)
    assert load_model(tmp_path / "dense").lm_head.weight.shape[0] == rows + 1


def drop(names, part):
    del names[next(n for n in names if part in n)]


def again(names, part):
    """Under the name that LLaVA v1.6 gives it."""
    key = next(n for n in names if part in n)
    names[key.replace("model.vision_tower.", "model.vision_tower.vision_tower.")] = names[key].clone()


def transpose(names, part):
    key = next(n for n in names if part in n)
    names[key] = names[key].t().contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: drop(s, "experts.1.fc1.weight"), "experts.w1: expert 1 is missing"),
        (lambda s: drop(s, "self_attn.q_proj.weight"), "1 places no tensor .*q_proj"),
        (lambda s: transpose(s, "experts.1.fc1.weight"), "experts.w1: its experts have several shapes"),
        (lambda s: [transpose(s, f"experts.{e}.fc1.weight") for e in range(3)], r"w1 would be \[3, 16, 64\]; expected"),
        (lambda s: s.update({"model.mm_projector.layer_norm.weight": torch.ones(32)}), "1 tensors have no place"),
        (lambda s: again(s, "patch_embedding.weight"), "1 tensors have no place"),
    ],
    ids=["expert missing", "tensor missing", "one transposed", "all transposed", "one more", "one twice"],
)
def test_what_does_not_fit_is_refused(original, damage, message, tmp_path):
    dense, processor, vision = original
    model = upcycle(copy.deepcopy(dense), num_experts=3)
    state = moe_names(model)
    damage(state)
    source = write(tmp_path / "theirs", model, processor, state, moe_name="smoe", num_selected=2)
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "ours", version="v1.1", vision_tower=vision)
    assert not (tmp_path / "ours").exists()


def test_options_that_are_missing_or_impossible(original, tmp_path):
    dense, processor, vision = original
    model = upcycle(copy.deepcopy(dense), num_experts=3)
    state = moe_names(model)
    source = write(tmp_path / "theirs", model, processor, state, moe_name="smoe", num_selected=2)
    unknown = write(tmp_path / "unknown", model, processor, state, moe_name="xmoe", num_selected=2)
    save_model(model, tmp_path / "ours", processor=processor)
    save_model(dense, tmp_path / "dense", processor=processor)
    for arguments, options, message in [
        ((tmp_path / "none", tmp_path / "x"), {}, "no checkpoint folder"),
        ((source, tmp_path / "x"), {"version": "v1.1"}, "name the folder of the CLIP or SigLIP"),
        ((source, tmp_path / "x"), {"vision_tower": vision}, "say which LibMoE wrote it"),
        ((source, tmp_path / "x"), {"vision_tower": vision, "version": "v9"}, "choose v1.1 or v2"),
        ((unknown, tmp_path / "x"), {"vision_tower": vision, "version": "v1.1"}, "router 'xmoe' is not known"),
        ((tmp_path / "ours", tmp_path / "x"), {"vision_tower": vision}, "a checkpoint of libmoe_fast already"),
        ((tmp_path / "dense", tmp_path / "x"), {"vision_tower": vision}, "a Hugging Face model already"),
        ((tmp_path / "dense", tmp_path / "x"), {"to": "libmoe", "version": "v2"}, "is dense"),
        ((tmp_path / "ours", tmp_path / "x"), {"to": "libmoe"}, "for which LibMoE"),
    ]:
        with pytest.raises((ConfigError, CheckpointError), match=message):
            convert(*arguments, **options)
    assert not (tmp_path / "x").exists()
