"""Arbitrary input to every public edge: what is wrong is one of our errors in one line, never another exception.

Records are fuzzed in train/test_data.py. Examples are few, and the same on every run.
"""

import io
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import libmoe_fast
from libmoe_fast import CheckpointError, LibMoEError, MoE, load_model, upcycle
from libmoe_fast.errors import DataError
from libmoe_fast.train.tiny import tiny_llava

pytest.importorskip("jsonargparse")

from libmoe_fast.cli import main
from libmoe_fast.train.config import TrainConfig, flatten, plain
from libmoe_fast.train.images import load_image

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 10**30, 2**31, 2**63, -(2**70)]),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@FEW
@given(
    options=st.dictionaries(st.sampled_from(sorted(flatten(plain(TrainConfig())))), VALUES, min_size=1, max_size=4),
    whole=st.booleans(),
)
def test_configurations(options, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("libmoe_fast.train.loop.train", lambda config: None)
    given = {"run": {"folder": "x"}, "data": {"file": "x"}, "model": {"path": "x", "stage": 3}} if whole else {}
    for name, value in options.items():
        section, option = name.split(".")
        given.setdefault(section, {})[option] = value
    (tmp_path / "fuzz.yaml").write_text(yaml.safe_dump(given))
    status = main(["train", "--config", str(tmp_path / "fuzz.yaml")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 0 or (status == 2 and len(lines) == 1), (status, lines)


def outcome(function, kind: type[Exception]) -> tuple[str, object]:
    """What an error of this kind says, one line, or what the function returns; any other error is a failure."""
    try:
        return "", function()
    except kind as error:
        assert "\n" not in str(error).strip()  # noqa: PT017
        return str(error), None


def mutated(content: bytes, data: st.DataObject) -> bytes:
    """Some bytes changed, and perhaps the end cut off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        changed[data.draw(st.integers(0, len(changed) - 1), label="at")] ^= data.draw(st.integers(1, 255), label="bits")
    return bytes(changed[: data.draw(st.sampled_from([None, 0, 10, len(changed) // 2, len(changed) - 1]), label="cut")])


def picture(kind: str) -> bytes:
    image = Image.effect_noise((40, 24), 50).convert("RGB")
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "TGA")}


@settings(FEW, max_examples=150)
@given(kind=st.sampled_from(sorted(PICTURES)), square=st.booleans(), data=st.data())
def test_images(kind, square, data, tmp_path):
    (tmp_path / "image").write_bytes(mutated(PICTURES[kind], data))
    error, image = outcome(lambda: load_image(tmp_path / "image", square=square), DataError)
    assert str(tmp_path / "image") in error if error else image.mode == "RGB"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A swapped model as save_model writes it, and as transformers does."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model, _ = tiny_llava("clip", dim=16, vision_layers=1, text_layers=1)
    upcycle(model, num_experts=2, top_k=1)
    libmoe_fast.save_model(model, folder / "ours")
    model.save_pretrained(folder / "theirs")
    return folder


@settings(FEW, max_examples=50)
@given(kind=st.sampled_from(["ours", "theirs"]), data=st.data())
def test_checkpoints(kind, data, saved, tmp_path):
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / kind, folder)
    file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())), label="file")
    file.write_bytes(mutated(file.read_bytes(), data))
    error, model = outcome(lambda: load_model(folder), CheckpointError)
    assert str(folder) in error if error else not any(tensor.is_meta for tensor in model.state_dict().values())


SIZES = st.integers(-2, 9)
LAYER_OPTIONS = ["activation", "gated", "bias", "balance_coef", "z_coef", "aux_weight", "balance_over", "balance_scope"]
LAYER_OPTIONS += ["aux_mode", "router_options", "backend"]


@settings(FEW, max_examples=200)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES),
    num_experts=st.integers(-1, 5),
    top_k=st.integers(-1, 6),
    router=st.sampled_from([*libmoe_fast.ROUTERS, "", "smoe ", "no.such:Router", "os:path"]),
    options=st.dictionaries(
        st.sampled_from(
            ["activation", "gated", "bias", "balance_coef", "z_coef", "balance_over", "aux_mode", "backend"]
        )
        | st.sampled_from(["router_options", "aux_weight", "balance_scope"]),
        VALUES,
        max_size=2,
    ),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
)
def test_layers(sizes, num_experts, top_k, router, options, shape, dtype):
    def run():
        layer = MoE(*sizes, num_experts=num_experts, top_k=top_k, router=router, **options)
        return layer(torch.ones(shape, dtype=dtype))

    error, y = outcome(run, LibMoEError)
    assert error or (y[0] if isinstance(y, tuple) else y).shape == (*shape[:-1], sizes[2])
