"""Save and reload: equal outputs for all routers, and refusal of everything that does not fit."""

import copy
import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import libmoe_fast
from libmoe_fast import ROUTERS, CheckpointError, checkpoint, load_model, moe_layers, save_model, upcycle
from libmoe_fast.train.tiny import tiny_llava


@pytest.fixture(scope="module")
def dense():
    return tiny_llava("clip", vision_layers=2, text_layers=1)


def outputs(model, processor):
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = processor.tokenizer("<image>" * 16 + " odd or even?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=image).logits


OPTIONS = {"cosine": {"learn_temperature": True, "proj_dim": 8}, "smoe": {"noise": "learned"}}


@pytest.mark.parametrize("router", [*ROUTERS, None])
def test_reload_gives_equal_outputs(dense, router, tmp_path):
    model, processor = copy.deepcopy(dense[0]), dense[1]
    if router:
        upcycle(model, router=router, router_options=OPTIONS.get(router), num_experts=3, balance_coef=0.02)
    for parameter in model.parameters():  # experts and gates away from their start
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_model(model, tmp_path / "saved", processor=processor)
    torch.manual_seed(99)  # a reload must not depend on fresh random numbers
    loaded = load_model(tmp_path / "saved")
    assert torch.equal(outputs(loaded, processor), outputs(model, processor))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, layer in moe_layers(loaded).items():
        assert layer.config() == moe_layers(model)[name].config()
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    assert (tmp_path / "saved" / "tokenizer.json").exists()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("router", ROUTERS)
def test_what_transformers_saved_is_read(dense, router, shards, tmp_path):
    """As its Trainer does: with names of its own for the weights, in one file or several."""
    model = upcycle(copy.deepcopy(dense[0]), router=router, router_options=OPTIONS.get(router), num_experts=3)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "saved", **shards)
    loaded = load_model(tmp_path / "saved", backend="reference")
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded, dense[1]), outputs(load_like(model, "reference"), dense[1]))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    save_model(loaded, tmp_path / "again")
    assert torch.equal(outputs(load_model(tmp_path / "again"), dense[1]), outputs(model, dense[1]))


def load_like(model, backend):
    other = copy.deepcopy(model)
    for layer in moe_layers(other).values():
        layer.backend = backend
    return other


def test_a_trainers_checkpoint_is_read(dense, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, processor = upcycle(copy.deepcopy(dense[0]), num_experts=3), dense[1]
    ids = processor.tokenizer("<image>" * 16 + " odd or even?", return_tensors="pt")["input_ids"][0]
    sample = {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(3, 32, 32)}
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, save_steps=2, use_cpu=True, report_to=[], learning_rate=1e-3
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=[sample] * 4).train()
    loaded = load_model(tmp_path / "checkpoint-2")
    assert torch.equal(outputs(loaded, processor), outputs(model, processor))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda recipe: recipe.update(version=99), "config.json has layout 'libmoe_fast.stacked' version 99"),
        (lambda recipe: recipe.pop("layers"), "config.json is missing or damaged .KeyError"),
        (lambda recipe: recipe["layers"].popitem(), "does not fit LlavaForConditionalGeneration: missing"),
    ],
)
def test_what_transformers_saved_is_refused_if_it_does_not_fit(dense, damage, message, tmp_path):
    upcycle(copy.deepcopy(dense[0]), num_experts=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config["libmoe_fast"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_dtype_and_backend_are_chosen_at_load(dense, tmp_path):
    save_model(upcycle(copy.deepcopy(dense[0]), router="hyper"), tmp_path / "m")
    loaded = load_model(tmp_path / "m", dtype=torch.bfloat16, backend="reference")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {layer.backend for layer in moe_layers(loaded).values()} == {"reference"}


def test_loading_draws_no_weights():
    """A random start that is overwritten takes minutes at a real model's size; without accelerate it is drawn."""
    pytest.importorskip("accelerate")
    with checkpoint.empty_weights():
        layer = nn.Linear(4, 4)
    assert layer.weight.is_meta


def test_a_reloaded_model_trains(dense, tmp_path):
    save_model(upcycle(copy.deepcopy(dense[0])), tmp_path / "m")
    loaded = load_model(tmp_path / "m").train()
    ids = dense[1].tokenizer("<image>" * 16 + " odd", return_tensors="pt")["input_ids"]
    (loaded(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 32, 32)).loss / 4).backward()
    assert {layer.aux_scale.item() for layer in moe_layers(loaded).values()} == {0.25}


@pytest.mark.parametrize("swapped", [True, False])
def test_others_can_read_what_the_umask_lets_them(dense, swapped, tmp_path):
    before = os.umask(0o027)
    try:
        save_model(upcycle(copy.deepcopy(dense[0])) if swapped else dense[0], tmp_path / "m", processor=dense[1])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()}
    assert len(modes) > 3
    assert set(modes.values()) == {0o640}, modes


def test_any_module_can_be_saved(tmp_path):
    def build():
        model = nn.Module()
        model.mm_projector = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        return model

    model = upcycle(build(), targets="projector")
    save_model(model, tmp_path / "m")
    loaded = checkpoint.load_weights(build(), tmp_path / "m")
    x = torch.randn(4, 8)
    assert torch.equal(loaded.mm_projector(x), model.mm_projector(x))


def test_stock_from_pretrained_does_not_drop_experts_silently(dense, tmp_path):
    from transformers import LlavaForConditionalGeneration

    save_model(upcycle(copy.deepcopy(dense[0])), tmp_path / "m")
    with pytest.raises(OSError, match="no file named"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "m")


@pytest.fixture
def saved(dense, tmp_path):
    save_model(upcycle(copy.deepcopy(dense[0])), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("swapped", [True, False], ids=["experts", "dense"])
def test_weights_in_parts(dense, tmp_path, swapped):
    """None larger than asked for, but where one tensor is; whole again, and an older whole file is gone."""
    model = upcycle(copy.deepcopy(dense[0])) if swapped else copy.deepcopy(dense[0])
    save_model(model, tmp_path / "m")
    whole = {path.name for path in (tmp_path / "m").glob("*.safetensors")}
    assert len(whole) == 1
    save_model(model, tmp_path / "m", max_shard_size=100_000)
    parts = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(parts) > 3
    assert not whole & {path.name for path in parts}
    for path in parts:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    loaded = load_model(tmp_path / "m").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=parts[1].name if swapped else "cannot be loaded"):
        load_model(tmp_path / "m")


def edit_recipe(folder, **changes):
    path = folder / "libmoe_fast.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    path = folder / "libmoe_fast.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def truncate(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def drop_experts(weights):
    del weights[next(k for k in weights if k.endswith("experts.w1"))]


def transpose_experts(weights):
    """Another library's [N, D, H] of the vision layers (the projector's are square: only the layout's name tells)."""
    key = next(k for k in weights if "vision" in k and k.endswith("experts.w1"))
    weights[key] = weights[key].transpose(1, 2).contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda f: truncate(f / "libmoe_fast.safetensors"), "truncated", id="truncated-weights"),
        pytest.param(lambda f: truncate(f / "libmoe_fast.json"), "damaged", id="truncated-recipe"),
        pytest.param(lambda f: truncate(f / "config.json"), "config.json cannot be loaded", id="truncated-config"),
        pytest.param(lambda f: (f / "config.json").unlink(), "no config.json", id="no-config"),
        pytest.param(lambda f: (f / "libmoe_fast.safetensors").unlink(), "missing", id="no-weights"),
        pytest.param(lambda f: edit_recipe(f, version=2), "version 2.*reads .*stacked' version 1", id="version"),
        pytest.param(lambda f: edit_recipe(f, layout="other"), "layout 'other' version 1", id="layout"),
        pytest.param(lambda f: edit_weights(f, drop_experts), "missing .*experts.w1", id="missing"),
        pytest.param(lambda f: edit_weights(f, lambda w: w.update(x=torch.ones(1))), "unexpected x", id="unexpected"),
        pytest.param(lambda f: edit_weights(f, transpose_experts), "size mismatch", id="transposed"),
    ],
)
def test_what_does_not_fit_is_refused(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_a_foreign_dense_checkpoint_is_refused(dense, tmp_path):
    save_model(dense[0], tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights[next(k for k in weights if "fc1" in k)]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing"):
        load_model(tmp_path / "m")


def test_full_disk_keeps_the_previous_checkpoint(dense, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_model(upcycle(copy.deepcopy(dense[0])), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_a_real_write_error_is_a_checkpoint_error(dense, saved):
    """No mock: a file-size limit of the operating system stops the writer halfway, in a process of its own."""
    code = (
        "import resource, signal, sys, libmoe_fast\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "model = libmoe_fast.load_model(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    libmoe_fast.save_model(model, sys.argv[1])\n"
        "except libmoe_fast.CheckpointError as error:\n    print('refused:', error)\n"
    )
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code, saved], capture_output=True, text=True, check=True, env=environment
    )
    assert "refused:" in run.stdout
    assert "previous content survives" in run.stdout
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_zero3_weights_can_be_given(dense, tmp_path):
    model = upcycle(copy.deepcopy(dense[0]))
    gathered = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    save_model(model, tmp_path / "m", state_dict=gathered)
    assert not any(p.any() for p in libmoe_fast.load_model(tmp_path / "m").parameters())


def test_biases_under_their_old_names_are_read(dense):
    """Files that were written when they were experts.b1 and experts.b2."""
    model = upcycle(copy.deepcopy(dense[0]), router="smoe", num_experts=3)
    old = {re.sub(r"experts\.bias(\d)$", r"experts.b\1", n): t + 0.5 for n, t in model.state_dict().items()}
    assert "experts.b1" in " ".join(old)
    model.load_state_dict(old)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, old[re.sub(r"experts\.bias(\d)$", r"experts.b\1", name)])


@pytest.mark.parametrize("router", ROUTERS)
def test_transformers_trainer_decays_weights_alone(dense, router):
    """It goes by names: "bias", and what lies in a "norm"."""
    from transformers import Trainer

    model = upcycle(copy.deepcopy(dense[0]), router=router, router_options=OPTIONS.get(router), num_experts=3)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    own = {f"{place}.{name}": p for place, layer in moe_layers(model).items() for name, p in layer.named_parameters()}
    spared = own.keys() - decayed
    assert {name for name, p in own.items() if "bias" in name or p.ndim == 0} == spared
    assert all(f"{place}.experts.bias{number}" in spared for place in moe_layers(model) for number in (1, 2))
