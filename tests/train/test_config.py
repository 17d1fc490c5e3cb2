"""Options: presets that parse, and settings that cannot work, refused in one line."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import libmoe_fast.train
from libmoe_fast.errors import ConfigError
from libmoe_fast.train.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    add_train_arguments,
    check,
    config_from_namespace,
    flatten,
    plain,
)
from libmoe_fast.train.engine import LAUNCHER_VARIABLES, _launched, deepspeed_config

PRESETS = Path(libmoe_fast.train.__path__[0]) / "presets"


def parse(*arguments: str) -> TrainConfig:
    parser = ArgumentParser(exit_on_error=False)
    add_train_arguments(parser)
    return config_from_namespace(parser.parse_args(arguments))


def preset(*names: str) -> list[str]:
    return [f"--config={PRESETS / name}.yaml" for name in names]


@pytest.fixture
def good() -> TrainConfig:
    return TrainConfig(
        run=RunConfig(folder="runs/x"),
        model=ModelConfig(stage=3, path="dense"),
        data=DataConfig(file="train.json"),
    )


# LibMoE v1.1's scripts: samples per step on 4 GPUs, tokens, ZeRO stage, offload, padding, coefficients.
PUBLISHED = {
    ("clip_phi3", 1): (256, 2048, 2, False, "none", None),
    ("clip_phi3", 2): (96, 4096, 3, False, "pad", None),
    ("clip_phi3", 3): (80, 2048, 3, True, "pad", (0.1, 0.01)),
    ("siglip_phi3", 1): (256, 2048, 2, False, "none", None),
    ("siglip_phi3", 2): (96, 4096, 3, False, "pad", None),
    ("siglip_phi3", 3): (40, 2048, 3, True, "pad", (0.1, 0.01)),
    ("siglip_phi35", 1): (256, 2048, 2, False, "none", None),
    ("siglip_phi35", 2): (24, 2048, 3, True, "pad", None),
    ("siglip_phi35", 3): (40, 2048, 3, False, "pad", (0.01, 0.001)),
}


@pytest.mark.parametrize(("model", "stage"), PUBLISHED)
def test_presets_are_the_published_scripts(model, stage):
    path = [] if stage == 1 else ["--model.path=before"]
    config = parse(*preset(f"{model}_stage{stage}"), "--data.file=x.json", "--run.folder=x", *path)
    check(config)
    samples, tokens, zero, offload, aspect, coefficients = PUBLISHED[model, stage]
    assert config.optim.batch_size * config.optim.accumulation * 4 == samples
    assert (config.data.max_length, config.data.image_aspect) == (tokens, aspect)
    assert (config.engine.zero_stage, config.engine.offload, config.engine.dtype) == (zero, offload, "bf16")
    assert config.optim.lr == {1: 1e-3, 2: 2e-6, 3: 4e-6}[stage]
    assert (config.optim.warmup_ratio, config.optim.weight_decay, config.optim.epochs) == (0.03, 0.0, 1)
    assert config.model.stage == stage
    if stage == 1:  # later stages take these from the checkpoint
        assert config.model.scales == [1, 3]
        assert config.model.chat_template == ("phi3.5" if model == "siglip_phi35" else "phi3")
    if stage == 3:
        assert (config.model.balance_coef, config.model.z_coef) == coefficients
        assert (config.model.num_experts, config.model.top_k, config.data.fraction) == (4, 2, 0.5)


def test_later_files_and_the_command_line_win(tmp_path):
    (tmp_path / "mine.yaml").write_text("optim: {lr: 1.0e-5, accumulation: 7}\n")
    files = [*preset("clip_phi3_stage3"), f"--config={tmp_path / 'mine.yaml'}"]
    config = parse(*files, "--optim.lr=4e-6", "--model.router=cosine")
    assert (config.optim.lr, config.optim.accumulation, config.model.router) == (4e-6, 7, "cosine")
    assert config.optim.batch_size == 5  # still the preset's


def test_options_without_a_section():
    assert not parse().data.skip_bad_samples
    assert parse("--skip-bad-samples", "--local_rank=1").data.skip_bad_samples  # the deepspeed launcher adds the second
    assert parse("--model.router_options={temperature: 0.5}").model.router_options == {"temperature": 0.5}


def test_written_config_reads_back(tmp_path, good):
    good.optim.betas = (0.9, 0.95)
    good.model.router_options = {"temperature": 0.5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(good)))
    assert parse(f"--config={tmp_path / 'config.yaml'}") == good


def test_every_option_is_explained():
    parser = ArgumentParser()
    add_train_arguments(parser)
    text = " ".join(parser.format_help().split())
    for section in dataclasses.fields(TrainConfig):
        for option in dataclasses.fields(section.default_factory):
            assert f"--{section.name}.{option.name} " in text
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert undocumented == []


BAD = {
    "model.router": ("nope", "unknown router 'nope'; choose one of smoe, cosine"),
    "model.top_k": (5, "top_k"),
    "model.router_options": ({"temprature": 1.0}, "temprature"),
    "model.stage": (4, r"model.stage is 4; choose 1, 2 or 3"),
    "model.targets": (["text"], "unknown upcycle target 'text'"),
    "model.path": (None, "name either model.path"),
    "model.vision_tower": ("clip", "name either model.path"),
    "run.folder": ("", "run.folder is not set"),
    "run.save_every": (0, "run.save_every is 0; it must be at least 1"),
    "run.seed": (-1, "run.seed is -1"),
    "data.file": ("", "data.file is not set"),
    "optim.max_steps": (0, "optim.max_steps is 0"),
    "optim.lr": (0.0, "optim.lr is 0.0; it must be positive"),
    "optim.warmup_ratio": (1.5, "optim.warmup_ratio is 1.5"),
    "engine.zero_stage": (4, "engine.zero_stage is 4; it must be from 0 to 3"),
    "engine.offload": (True, "engine.offload needs"),
}
FURTHER = [
    ("model.router_options", {"device": "cpu"}, "no option device"),
    ("model.router_options", {"temperature": "hot"}, "temperature is 'hot'; it must be a positive number"),
    ("model.router_options", {"temperature": math.nan}, "temperature is nan; it must be a positive number"),
    ("model.balance_coef", math.nan, "model.balance_coef is nan"),
    ("run.seed", 2**32, "run.seed is 4294967296; it must be from 0 to 4294967295"),
    ("data.workers", -1, "data.workers is -1"),
    ("optim.lr", math.nan, "optim.lr is nan"),
    ("optim.lr", math.inf, "optim.lr is inf"),
    ("optim.weight_decay", -1.0, "optim.weight_decay is -1.0; it must be at least 0"),
    ("optim.weight_decay", math.nan, "optim.weight_decay is nan"),
    ("optim.betas", (0.9, 1.0), "each of optim.betas is 1.0; it must be at least 0 and below 1"),
    ("optim.betas", (-0.1, 0.9), "each of optim.betas is -0.1"),
    ("optim.batch_size", 10**22, "no more than 1,000,000,000"),
    ("optim.max_grad_norm", -1.0, "optim.max_grad_norm is -1.0"),
    pytest.param(
        *("engine.dtype", "fp16", "fp16, but there is no GPU"),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU"),
    ),
]


@pytest.mark.parametrize(("option", "value", "message"), [*((name, *case) for name, case in BAD.items()), *FURTHER])
def test_what_cannot_work_is_refused(option, value, message, good):
    good.engine.zero_stage = 0
    good.model.router = "cosine"
    check(good)
    section, name = option.split(".")
    setattr(getattr(good, section), name, value)
    with pytest.raises(ConfigError, match=message) as error:
        check(good)
    assert "\n" not in str(error.value)


def test_routers_are_checked_in_stage_3_only(good):
    good.model.stage, good.model.router = 2, "nope"
    check(good)


def test_deepspeed_options_are_merged(good):
    good.engine.zero_stage = 3
    good.engine.deepspeed = {"zero_optimization": {"overlap_comm": False}, "steps_per_print": 5}
    settings = deepspeed_config(good)
    assert settings["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert settings["steps_per_print"] == 5
    good.engine.offload = True
    assert set(deepspeed_config(good)["zero_optimization"]) == {
        "stage",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
    }


def test_flatten():
    assert flatten({"run": {"folder": "x", "seed": 1}}) == {"run.folder": "x", "run.seed": 1}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_batch_size": 7}, "optim.batch_size and optim.accumulation"),
        ({"gradient_accumulation_steps": 2}, "optim.accumulation"),
        ({"bf16": {"enabled": False}}, "engine.dtype"),
        ({"zero_optimization": {"stage": 1}}, "engine.zero_stage"),
        ({"optimizer": {"type": "Adam"}}, "optim"),
    ],
)
def test_a_setting_has_one_place(good, settings, expected):
    good.engine.deepspeed = settings
    with pytest.raises(ConfigError, match=f"set {expected} instead"):
        check(good)


def test_other_deepspeed_settings_are_merged(good):
    good.engine.deepspeed = {"zero_optimization": {"reduce_bucket_size": 10**6}, "wall_clock_breakdown": True}
    check(good)
    assert deepspeed_config(good)["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 10**6}


def test_a_launcher_that_said_half_of_it(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not _launched()
    monkeypatch.setenv("WORLD_SIZE", "1")  # left in a shell, or by a scheduler: one process all the same
    assert not _launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        _launched()
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "2")
    assert _launched()
