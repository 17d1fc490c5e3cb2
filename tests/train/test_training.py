"""The loop in one process: against plain PyTorch, however the batch is cut, and under every kind of bad luck."""

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import computed, make_config, write_data, write_model
from transformers import AutoProcessor

from libmoe_fast import load_model, save_model, use_scales
from libmoe_fast.checkpoint import FORMAT
from libmoe_fast.errors import CheckpointError, ConfigError, DataError, DivergedError
from libmoe_fast.lmms import LibMoEFast
from libmoe_fast.multiscale import scales_of
from libmoe_fast.train import loop, state
from libmoe_fast.train.chat import TEMPLATES
from libmoe_fast.train.data import ConversationDataset, make_collator
from libmoe_fast.train.engine import learning_rate, start_processes
from libmoe_fast.train.loop import train
from libmoe_fast.train.model import build_model, image_tokens
from libmoe_fast.train.sampler import ModalityLengthSampler
from libmoe_fast.train.tiny import tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory, model, images):
    """Three steps of 8 samples, in one forward pass each."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    train(make_config(folder, model, images))
    return folder


def test_a_group_that_was_there_before(monkeypatch):
    """In a notebook, or left by other code: DeepSpeed insists on a variable that only a launcher sets."""
    start_processes()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    start_processes()
    assert os.environ["LOCAL_RANK"] == "0"


def final_weights(folder):
    return load_file(folder / "final" / "libmoe_fast.safetensors")


def test_a_step_equals_plain_pytorch(tmp_path, model, images):
    config = make_config(tmp_path / "run", model, images, optim__max_steps=1, optim__max_grad_norm=0.0)
    train(config)
    (line,) = computed(tmp_path / "run")

    torch.manual_seed(config.run.seed)
    plain, processor = build_model(config.model, dtype=torch.float32)
    plain.train()
    dataset = ConversationDataset(config.data, processor, image_tokens=image_tokens(plain), template="phi3")
    sizes = {"batch_size": 8, "accumulation": 1, "world_size": 1, "rank": 0, "seed": config.run.seed, "steps": 1}
    (indices,) = ModalityLengthSampler(dataset.lengths, dataset.has_image, **sizes)
    batch = make_collator(processor, image_tokens(plain))([dataset[i] for i in indices])
    optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=config.optim.lr, weight_decay=0
    )
    loss = plain(**batch.inputs).loss
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    optimizer.step()

    assert line["lr"] == config.optim.lr
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    trained = load_model(tmp_path / "run" / "final").state_dict()
    for name, value in plain.state_dict().items():
        # Adam's first step is lr * sign(gradient): a gradient of rounding size may have either sign.
        torch.testing.assert_close(trained[name], value, atol=2.1 * config.optim.lr, rtol=0)
        assert ((trained[name] - value).abs() > 1e-5).float().mean() < 0.01, name


@pytest.mark.parametrize(
    "options",
    [
        {"optim__batch_size": 2, "optim__accumulation": 4},
        {"engine__checkpointing": "non_reentrant"},
        {"engine__checkpointing": "reentrant"},
        {
            "optim__batch_size": 4,
            "optim__accumulation": 2,
            "engine__checkpointing": "non_reentrant",
            "engine__zero_stage": 2,
        },
        {"engine__zero_stage": 3},
        {"engine__zero_stage": 1, "data__workers": 1},
    ],
    ids=lambda options: "-".join(f"{key.split('__')[1]}={value}" for key, value in options.items()),
)
def test_how_a_step_is_run_changes_nothing(options, tmp_path, model, images, base):
    train(make_config(tmp_path / "run", model, images, **options))
    expected = computed(base)
    assert len(expected) == 3
    for line, same in zip(computed(tmp_path / "run"), expected, strict=True):
        shares, other = line.pop("expert_share"), same.pop("expert_share")
        assert line == pytest.approx(same, rel=2e-4)
        assert set(shares) == set(other)
        for layer in shares:
            assert shares[layer] == pytest.approx(other[layer], abs=0.02)  # a choice or two may flip on rounding
            assert sum(shares[layer]) == pytest.approx(1)  # recomputation is not counted


def test_auxiliary_losses_reach_the_gradient(tmp_path, model, images, base):
    train(make_config(tmp_path / "run", model, images, model__balance_coef=0.0, model__z_coef=0.0, optim__max_steps=1))
    without, with_aux = computed(tmp_path / "run")[0], computed(base)[0]
    assert without["loss"] == with_aux["loss"]
    assert without["grad_norm"] != pytest.approx(with_aux["grad_norm"], rel=1e-3)


def test_text_only_batches_leave_the_vision_side_alone(tmp_path, model):
    texts = write_data(tmp_path / "texts", images=0, texts=16)
    train(make_config(tmp_path / "run", model, texts, engine__checkpointing="non_reentrant"))
    config = make_config(tmp_path / "run", model, texts)
    torch.manual_seed(config.run.seed)
    before, after = build_model(config.model, dtype=torch.float32)[0].state_dict(), final_weights(tmp_path / "run")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision_tower" in name or "projector" in name for name in changed)
    for line in computed(tmp_path / "run"):
        assert line["loss"] > 0
        assert (line["balance_loss"], line["z_loss"], line["expert_share"]) == (None, None, {})


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_stage_1_trains_the_projector_alone(checkpointing, tmp_path, model):
    data = write_data(tmp_path / "data", images=8, texts=8)
    options = {"model__stage": 1, "engine__zero_stage": 2, "engine__checkpointing": checkpointing}
    train(make_config(tmp_path / "run", model, data, **options, optim__max_steps=4))
    before, after = (load_model(folder).state_dict() for folder in (model, tmp_path / "run" / "final"))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    projector = {name for name in after if "multi_modal_projector" in name}
    assert changed == projector != set()


def test_bf16_follows_fp32(tmp_path, model, images, base):
    train(make_config(tmp_path / "run", model, images, engine__dtype="bf16", engine__zero_stage=2))
    losses, expected = ([line["loss"] for line in computed(folder)] for folder in (tmp_path / "run", base))
    assert losses == pytest.approx(expected, rel=0.02)
    assert {value.dtype for value in final_weights(tmp_path / "run").values()} == {torch.bfloat16}


def test_mixed_data_takes_steps_of_both_kinds(tmp_path, model):
    data = write_data(tmp_path / "data", images=9, texts=9)
    options = {"optim__max_steps": None, "optim__batch_size": 2, "optim__accumulation": 4, "run__log_every": 2}
    train(make_config(tmp_path / "run", model, data, **options))
    lines = computed(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]  # 8 images, 8 texts, 1 + 1 and a fill
    assert sum(line["balance_loss"] is None for line in lines) == 1
    assert all(1 <= line["balance_loss"] < 4 for line in lines if line["balance_loss"] is not None)  # N = 4


def test_log_says_all_there_is_to_say(base):
    line = json.loads((base / "log.jsonl").read_text().splitlines()[-1])
    assert set(line) == {
        *("step", "total_steps", "loss", "balance_loss", "z_loss", "lr", "grad_norm", "tokens_per_second"),
        *("step_seconds", "skipped_samples", "expert_share", "top_k"),
    }
    layers = ["model.vision_tower.encoder.layers.0.mlp", "model.vision_tower.encoder.layers.1.mlp"]
    assert list(line["expert_share"]) == [*layers, "model.multi_modal_projector"]
    assert (line["step"], line["total_steps"], line["top_k"], line["skipped_samples"]) == (3, 3, 2, 0)


def test_tensorboard_gets_the_same_numbers(tmp_path, model, images):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(make_config(tmp_path / "run", model, images, run__tensorboard=True, optim__max_steps=2))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = computed(tmp_path / "run")
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2]
    for name in ("loss", "balance_loss", "z_loss", "grad_norm", "lr"):
        values = [event.value for event in board.Scalars(f"train/{name}")]
        assert values == pytest.approx([line[name] for line in lines], rel=1e-6)
    share = board.Scalars("expert_share/model.multi_modal_projector/3")[1].value
    assert share == pytest.approx(lines[1]["expert_share"]["model.multi_modal_projector"][3])


def test_hyper_raises_its_k(tmp_path, model, images):
    train(make_config(tmp_path / "run", model, images, model__router="hyper", model__top_k=3, optim__max_steps=6))
    lines = computed(tmp_path / "run")
    assert [line["top_k"] for line in lines] == [1, 1, 2, 2, 2, 3]  # round(2 * step / 6) + 1, halves to even
    assert all(line["balance_loss"] is None for line in lines)


def test_schedule():
    options = {"peak": 2.0, "steps": 110, "warmup_ratio": 0.09}  # 9.9: ten steps of warm-up
    rates = [learning_rate(step, **options) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)  # halfway down
    assert 0 < rates[109] < 0.01


def test_finished_run_says_so(base, model, images, capsys):
    before = (base / "log.jsonl").read_text()
    train(make_config(base, model, images, run__log_every=7, data__workers=1))  # neither changes what is computed
    assert "is done already" in capsys.readouterr().out
    assert (base / "log.jsonl").read_text() == before
    assert not (base / "checkpoints").exists()


def test_changed_options_are_named(base, model, images):
    changed = make_config(base, model, images, optim__lr=5e-3, model__router="smoe", run__save_every=7)
    with pytest.raises(ConfigError, match=r"optim\.lr was 0\.01 and is 0\.005") as error:
        train(changed)
    assert "model.router was 'cosine' and is 'smoe'" in str(error.value)
    assert "save_every" not in str(error.value)


def press_ctrl_c(monkeypatch, *, during: int):
    """Sends SIGINT to this process in the middle of step `during` (0-based)."""
    original = loop.learning_rate

    def pressing(step, **options):
        if step == during:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, **options)

    monkeypatch.setattr(loop, "learning_rate", pressing)


def full_disk(monkeypatch):
    """Files end after 64 KB: torch's zip writer fails inside DeepSpeed's files, and does not raise an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))


def no_space(monkeypatch):
    """Files are written, but the disk has no room for them when they are flushed to it."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "sync_tree", refuse)


@pytest.mark.parametrize("disaster", [full_disk, no_space])
def test_ctrl_c_then_a_full_disk_lose_nothing(disaster, tmp_path, model, images, monkeypatch):
    options = {"optim__max_steps": 6, "run__save_every": 5}
    train(make_config(tmp_path / "whole", model, images, **options))
    config = make_config(tmp_path / "run", model, images, **options)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, during=1)
        with pytest.raises(KeyboardInterrupt, match="saved after step 3 of 6"):
            train(config)
    assert signal.getsignal(signal.SIGINT) is handler
    checkpoints = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        try:
            disaster(patch)
            with pytest.raises(CheckpointError, match="step-5 cannot be written"):
                train(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["step-3"]
    assert (checkpoints / "latest").read_text() == "step-3"
    train(config)
    assert computed(tmp_path / "run") == computed(tmp_path / "whole")
    ours, theirs = final_weights(tmp_path / "run"), final_weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def stopped(tmp_path, model, images, monkeypatch):
    """The config of a run that was stopped after step 2 of 4."""
    config = make_config(tmp_path / "run", model, images, optim__max_steps=4, run__delete_checkpoints_when_done=False)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, during=0)
        with pytest.raises(KeyboardInterrupt, match="after step 2 of 4"):
            train(config)
    return config


def test_damaged_checkpoint_is_named(stopped):
    for file in Path(stopped.run.folder, "checkpoints", "step-2").glob("*model_states.pt"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-2 cannot be read"):
        train(stopped)


@pytest.mark.parametrize("file", ["rank-0.pt", "*model_states.pt", "*optim_states.pt"])
def test_a_flipped_bit_in_a_checkpoint_is_found(file, stopped):
    """torch reads stored tensors without looking at their checksums."""
    for path in Path(stopped.run.folder, "checkpoints", "step-2").glob(file):
        with zipfile.ZipFile(path) as archive:
            stored = [info for info in archive.infolist() if "/data/" in info.filename]  # tensors
        largest = max(stored, key=lambda info: info.file_size)
        content = bytearray(path.read_bytes())
        name_and_extra = struct.unpack_from("<HH", content, largest.header_offset + 26)
        content[largest.header_offset + 30 + sum(name_and_extra) + largest.file_size // 2] ^= 4
        path.write_bytes(content)
        torch.load(path, weights_only=False)  # as if nothing were wrong
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged: the checksum of"):
            train(stopped)


def lose_a_record(model, images):
    records = json.loads(images.read_text())
    images.write_text(json.dumps(records[:-3]))
    return "data.file changed"


def other_weights(model, images):
    weights = load_file(model / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    return "the weights of model.path changed"


@pytest.mark.parametrize("change", [lose_a_record, other_weights])
def test_a_run_goes_on_from_its_own_inputs_only(change, tmp_path, monkeypatch):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data", images=16, texts=0)
    config = make_config(tmp_path / "run", model, data, optim__max_steps=4)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, during=0)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = [(path, path.read_bytes()) for path in (data, model / "model.safetensors")]
    message = change(model, data)
    with pytest.raises(ConfigError, match=message):
        train(config)
    for path, content in before:
        path.write_bytes(content)
    train(config)
    assert len(computed(tmp_path / "run")) == 4


def test_a_run_without_a_checkpoint_may_change_its_data(tmp_path, model):
    """A file that was mended after the first attempt failed."""
    data = write_data(tmp_path / "data", images=8, texts=0)
    whole = data.read_text()
    config = make_config(tmp_path / "run", model, data, optim__max_steps=1)
    records = json.loads(whole)
    records[0]["image"] = "broken.png"
    (tmp_path / "data" / "broken.png").write_bytes(b"not a PNG")
    data.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"broken\.png"):
        train(config)
    data.write_text(whole)
    train(config)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        pytest.param(torch.nan, {}, "the loss of step 1 is nan", id="weights-nan"),
        pytest.param(None, {"optim__lr": 1e9}, "of step [23] is", id="rate"),
        pytest.param(
            None, {"optim__lr": 1e9, "engine__zero_stage": 2, "engine__dtype": "bf16"}, "of step [23] is", id="bf16"
        ),
    ],
)
def test_what_is_not_finite_ends_the_run_and_is_not_saved(value, options, message, tmp_path, images):
    model = write_model(tmp_path / "model")
    if value is not None:
        weights = load_file(model / "model.safetensors")
        weights[next(name for name in weights if name.endswith("linear_2.weight"))][0] = value
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    options = {"optim__max_grad_norm": 0.0, "optim__warmup_ratio": 0.0, "run__save_every": 3} | options
    with pytest.raises(DivergedError, match=message):
        train(make_config(tmp_path / "run", model, images, **options))
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)


def test_later_stages_remember_how_they_were_trained(tmp_path, model, images):
    """Stage 2 with phi3.5 and no padding; stage 3 is told neither."""
    options = {"model__stage": 2, "model__chat_template": "phi3.5", "data__image_aspect": "none", "optim__max_steps": 1}
    train(make_config(tmp_path / "two", model, images, **options))
    stage2 = tmp_path / "two" / "final"
    train(make_config(tmp_path / "three", stage2, images, optim__max_steps=1))
    final = tmp_path / "three" / "final"
    assert json.loads((final / "config.json").read_text())[FORMAT] == {
        "chat_template": "phi3.5",
        "image_aspect": "none",
    }
    assert AutoProcessor.from_pretrained(final).chat_template == TEMPLATES["phi3.5"].jinja
    plugin = LibMoEFast(pretrained=str(final))
    assert plugin._image_aspect == "none"
    for contradiction, given in {"model__chat_template": "phi3", "data__image_aspect": "pad"}.items():
        with pytest.raises(ConfigError, match=f"is '{given}', but .* was trained with"):
            train(make_config(tmp_path / given, stage2, images, **{contradiction: given}))


def test_the_first_stage_leaves_padding_open(tmp_path, model, images):
    """LibMoE's scripts pad images from stage 2 on; what stage 1 did is taken where nothing is said."""
    train(make_config(tmp_path / "one", model, images, model__stage=1, data__image_aspect="none", optim__max_steps=1))
    stage1, formats = tmp_path / "one" / "final", {}
    for name, options in {"told": {"data__image_aspect": "pad"}, "silent": {}}.items():
        train(make_config(tmp_path / name, stage1, images, model__stage=2, optim__max_steps=1, **options))
        formats[name] = json.loads((tmp_path / name / "final" / "config.json").read_text())[FORMAT]
    assert formats == {
        "told": {"chat_template": "phi3", "image_aspect": "pad"},
        "silent": {"chat_template": "phi3", "image_aspect": "none"},
    }


@pytest.mark.parametrize(
    "options",
    [
        {"engine__zero_stage": 3, "engine__checkpointing": "non_reentrant"},
        {"optim__batch_size": 2, "optim__accumulation": 4, "engine__checkpointing": "reentrant"},
    ],
    ids=["zero 3", "accumulated"],
)
def test_several_scales_train_however_a_step_is_run(options, tmp_path, model, images):
    """S2 from a new LLaVA's stage on: later stages inherit it, and refuse another one."""
    llava, processor = tiny_llava(dim=16, vision_layers=2, text_layers=1)
    dense = tmp_path / "dense"
    save_model(use_scales(llava, (1, 2)), dense, processor=processor)
    logs = []
    for name, given in {"plain": {}, "other": options}.items():
        train(make_config(tmp_path / name, dense, images, optim__max_steps=2, **given))
        logs.append(computed(tmp_path / name))
    for line, same in zip(*logs, strict=True):
        shares, others = line.pop("expert_share"), same.pop("expert_share")
        assert line == pytest.approx(same, rel=2e-4)
        for layer in shares:
            assert shares[layer] == pytest.approx(others[layer], abs=1e-3)
    assert scales_of(load_model(tmp_path / "plain" / "final")) == (1, 2)
    with pytest.raises(ConfigError, match=r"model.scales is \[1, 3\], but .* was trained with \[1, 2\]"):
        train(make_config(tmp_path / "three", dense, images, model__scales=[1, 3]))


def test_longer_than_the_context_is_refused(tmp_path, model, images):
    with pytest.raises(ConfigError, match=r"data\.max_length is 513, but the language model has 512 positions"):
        train(make_config(tmp_path / "run", model, images, data__max_length=513))


def test_checkpoint_of_more_processes_that_lacks_their_parts(stopped):
    """A run goes on with another number of processes (test_processes.py), but not without what one of them had."""
    folder = Path(stopped.run.folder)
    (folder / "checkpoints" / "step-2" / "rank-1.pt").touch()
    options = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(options.replace("zero_stage: 0", "zero_stage: 2"))
    stopped.engine.zero_stage = 2
    with pytest.raises(CheckpointError, match=r"DeepSpeed cannot convert .*step-2 for another number of processes"):
        train(stopped)


def test_later_checkpoint_of_a_killed_run_does_not_outlive_the_latest(stopped, monkeypatch):
    checkpoints = Path(stopped.run.folder, "checkpoints")
    (checkpoints / "step-4").mkdir()  # written by a run that was killed before it became the latest
    stopped.run.save_every, stopped.run.keep_checkpoints = 3, 1

    def crash_after_step_3(step, **_):
        if step == 3:
            raise ZeroDivisionError
        return 0.0

    monkeypatch.setattr(loop, "learning_rate", crash_after_step_3)
    with pytest.raises(ZeroDivisionError):
        train(stopped)
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["step-3"]
    assert (checkpoints / "latest").read_text() == "step-3"


def test_nodes_that_share_no_disk_are_refused(tmp_path, model, images, monkeypatch):
    """Before anything is trained: what the other node reads in a folder of that name is nothing, or another run's."""
    monkeypatch.setattr(state, "collect_from_ranks", lambda lines: [*lines, "", "another run's"])
    with pytest.raises(ConfigError, match="processes 1, 2 do not see the run's folder"):
        train(make_config(tmp_path / "run", model, images))


def test_two_runs_in_one_folder_are_refused(tmp_path, model, images):
    (tmp_path / "run").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process trains in"):
            train(make_config(tmp_path / "run", model, images))
        other.communicate(b"\n")
    train(make_config(tmp_path / "run", model, images, optim__max_steps=1))


def test_broken_image_stops_or_is_counted(tmp_path, model):
    data = write_data(tmp_path / "data", images=8, texts=0)
    (tmp_path / "data" / "5.png").write_bytes(b"not a PNG")
    config = make_config(tmp_path / "strict", model, data)
    with pytest.raises(DataError, match=r"record 5 \(id 'image5'\): image .*5\.png cannot be read"):
        train(config)
    train(make_config(tmp_path / "skip", model, data, data__skip_bad_samples=True))
    listed = (tmp_path / "skip" / "skipped_samples.txt").read_text().splitlines()
    assert len(listed) == 1  # once, though each of the three epochs meets it
    assert "record 5 (id 'image5')" in listed[0]
    lines = [json.loads(line) for line in (tmp_path / "skip" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_samples"] for line in lines] == [1, 1, 1]


def test_a_bad_sample_does_not_end_a_run_for_good(tmp_path, model, capsys):
    """It stops at the image; with the option that the error names, the same command goes on from its checkpoint."""
    data = write_data(tmp_path / "data", images=24, texts=0)
    options = {"run__save_every": 1, "optim__max_steps": 3}
    train(make_config(tmp_path / "whole", model, data, **options))
    config = make_config(tmp_path / "run", model, data, **options)
    processed = AutoProcessor.from_pretrained(model)
    dataset = ConversationDataset(config.data, processed, image_tokens=16, template="phi3")
    batches = ModalityLengthSampler(
        dataset.lengths, dataset.has_image, batch_size=8, accumulation=1, world_size=1, rank=0, seed=0, steps=3
    )
    last = list(batches)[2]
    broken = tmp_path / "data" / f"{last[0]}.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"--skip-bad-samples leaves it out"):
        train(config)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-2"
    capsys.readouterr()
    train(make_config(tmp_path / "run", model, data, **options, data__skip_bad_samples=True))
    assert "data.skip_bad_samples was False, and is True from here on" in capsys.readouterr().out
    logged, expected = computed(tmp_path / "run"), computed(tmp_path / "whole")
    assert logged[:2] == expected[:2]
    assert len(logged) == 3


def test_exports_on_the_way(tmp_path, model, images):
    """Evaluable weights at shares of the steps; training itself is not changed by it."""
    train(make_config(tmp_path / "run", model, images, run__export_at=[0.34, 0.67, 1.0], run__save_every=1))
    exports = sorted(path.name for path in (tmp_path / "run" / "exports").iterdir())
    assert exports == ["step-1", "step-2"]
    stopped = make_config(tmp_path / "short", model, images, run__delete_checkpoints_when_done=False)
    train(stopped)
    first = load_model(tmp_path / "run" / "exports" / "step-1").state_dict()
    last = load_model(tmp_path / "run" / "final").state_dict()
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)
    other = load_model(tmp_path / "short" / "final").state_dict()
    assert all(torch.equal(last[name], value) for name, value in other.items())
    with pytest.raises(ConfigError, match=r"run.export_at has 10"):
        train(make_config(tmp_path / "wrong", model, images, run__export_at=[10]))


def test_bad_data_is_known_before_the_model_is_loaded(tmp_path, model, monkeypatch):
    data = write_data(tmp_path / "data", images=8, texts=0)
    (tmp_path / "data" / "0.png").unlink()
    monkeypatch.setattr(loop, "build_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"0\.png does not exist"):
        train(make_config(tmp_path / "run", model, data))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("final", {}, "final is a file"), ("tensorboard", {"run__tensorboard": True}, "tensorboard cannot be written")],
)
def test_files_where_folders_belong(tmp_path, model, images, name, options, expected):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("notes")
    with pytest.raises((ConfigError, CheckpointError), match=expected):
        train(make_config(tmp_path / "run", model, images, **options))
    assert (tmp_path / "run" / name).read_text() == "notes"


def test_a_file_system_without_locks(tmp_path, model, images, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(state.fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="has no locks"):
        train(make_config(tmp_path / "run", model, images, optim__max_steps=1))
    assert (tmp_path / "run" / "final").is_dir()


def test_settings_that_deepspeed_refuses(tmp_path, model, images):
    settings = {"zero_optimization": {"reduce_bucket_size": "many"}}
    with pytest.raises(ConfigError, match=r"DeepSpeed refuses its settings .*reduce_bucket_size"):
        train(make_config(tmp_path / "run", model, images, engine__deepspeed=settings))
