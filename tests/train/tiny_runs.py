"""Tiny training runs: data, models and configs for the tests here and for the scripts that they start."""

import json
from pathlib import Path

import numpy
from PIL import Image

from libmoe_fast import save_model
from libmoe_fast.train.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from libmoe_fast.train.tiny import tiny_llava

# What a step's line says about the computation; the rest is about time.
COMPUTED = ("step", "total_steps", "loss", "balance_loss", "z_loss", "lr", "grad_norm", "expert_share", "top_k")


def write_model(folder: Path, *, dropout: float = 0.0) -> Path:
    """A dense LLaVA. With dropout, its losses depend on the random state."""
    model, processor = tiny_llava(dim=16, vision_layers=2, text_layers=1, vocab_texts=["How bright is it? Hello Hi"])
    model.config.text_config.resid_pdrop = dropout
    save_model(model, folder, processor=processor)
    return folder


def write_data(folder: Path, *, images: int, texts: int) -> Path:
    """Random images with answers of different lengths, and text-only greetings. Returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    records = []
    for i in range(images):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        records.append(_record(f"image{i}", "<image>\nHow bright is it?", "bright " * (i % 3 + 1), image=f"{i}.png"))
    records += [_record(f"text{i}", "Hello " * (i % 2 + 1), "Hi " * (i % 4 + 1)) for i in range(texts)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def _record(name: str, question: str, answer: str, **image: str) -> dict:
    return {"id": name, "conversations": [_turn("human", question), _turn("gpt", answer)], **image}


def _turn(speaker: str, value: str) -> dict:
    return {"from": speaker, "value": value}


def make_config(folder: Path, model: Path, data: Path, **options) -> TrainConfig:
    """Stage 3 in fp32 on one process: 8 samples per step. Options are named as on the command line, dots as `__`."""
    config = TrainConfig(
        run=RunConfig(folder=str(folder), log_every=1, tensorboard=False, save_every=100),
        # Large coefficients, so that a wrong scale of the auxiliary losses shows.
        model=ModelConfig(stage=3, path=str(model), router="cosine", balance_coef=1.0, z_coef=0.1),
        data=DataConfig(file=str(data), max_length=64, workers=0),
        optim=OptimConfig(lr=1e-2, batch_size=8, max_steps=3),
        engine=EngineConfig(dtype="fp32", zero_stage=0, checkpointing="off"),
    )
    for option, value in options.items():
        section, name = option.split("__")
        assert hasattr(getattr(config, section), name), option
        setattr(getattr(config, section), name, value)
    return config


def computed(folder: Path) -> list[dict]:
    """log.jsonl without times."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in COMPUTED} for line in lines]
