"""Experts shared among 2 and 4 processes compute what whole layers do, and train through DeepSpeed's groups alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_runs import LAYERS
from safetensors.torch import load_file
from tiny_runs import computed, make_config, write_data, write_model

from libmoe_fast import ConfigError
from libmoe_fast.train.config import check
from libmoe_fast.train.loop import train

RANKS = range(4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    model, images = write_model(folder / "model"), write_data(folder / "images", images=24, texts=0)
    script = Path(__file__).with_name("parallel_runs.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(len(RANKS))]
    done = subprocess.run([*torchrun, script, folder, model, images], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    train(make_config(folder / "whole", model, images))
    return folder


@pytest.fixture(scope="module")
def found(runs):
    return [json.loads((runs / f"rank{rank}.json").read_text()) for rank in RANKS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("processes", [2, 4])
def test_equals_the_whole_layer(processes, layer, backend, dtype, found):
    """Outputs, and the gradients of tokens, router and experts, auxiliary losses included."""
    for rank in RANKS:
        errors = found[rank][f"{processes} processes, {layer}, {backend}, {dtype}"]
        assert errors.keys() >= {"y", "x", "experts.w1", "experts.w2"}
        for name, (parallel, whole, largest) in errors.items():
            assert parallel <= 2 * whole + 4 * torch.finfo(dtype).eps * largest, (rank, name)
            assert largest > 0 or rank == 1 or not name.startswith("experts.")


def test_saves_and_loads_whole_experts(found):
    assert [each["saved"] for each in found] == [0.0] * len(RANKS)


def test_what_cannot_be_shared_is_refused(found):
    uneven, dense, twice = found[0]["refused"]
    assert "0 has 6 experts, which 4 processes cannot share evenly" in uneven
    assert "Linear has no MoE layers; upcycle it first" in dense
    assert "wrapped (ParallelExperts)" in twice


@pytest.mark.parametrize("run", ["of_4", "of_2"])
def test_trains_as_whole_experts_do(run, runs):
    """of_2: two pairs of processes, whose experts' gradients are averaged between the pairs."""
    lines, expected = computed(runs / run), computed(runs / "whole")
    assert len(lines) == len(expected) == 3
    for line, same in zip(lines, expected, strict=True):
        line.pop("expert_share"), same.pop("expert_share")
        assert line == pytest.approx(same, rel=2e-4)
    final, whole = (load_file(runs / name / "final/libmoe_fast.safetensors") for name in (run, "whole"))
    assert final.keys() == whole.keys()
    for name, value in whole.items():
        # Adam moves a weight whose gradient is rounding alone by the rate, one way or the other.
        assert ((final[name] - value).abs() > 1e-3).float().mean() < 0.05, name


def test_a_stopped_run_goes_on_equally(runs):
    assert computed(runs / "stopped") == computed(runs / "of_2")
    final, same = (load_file(runs / name / "final/libmoe_fast.safetensors") for name in ("stopped", "of_2"))
    assert all(torch.equal(final[name], value) for name, value in same.items())


def test_another_number_of_processes_is_refused(runs):
    options = {"optim__batch_size": 2, "engine__zero_stage": 2, "engine__expert_parallel": 2}
    options |= {"engine__checkpointing": "non_reentrant", "optim__accumulation": 4}  # 8 samples a step, as before
    with pytest.raises(ConfigError, match="written by 4 processes with engine"):
        train(make_config(runs / "left", runs / "model", runs / "images" / "data.json", **options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine__zero_stage": 3}, "needs engine.zero_stage 2; it is 3"),
        ({"model__stage": 2}, "no experts in stage 2"),
        ({"model__num_experts": 3}, "does not divide the 3 experts"),
        ({"engine__expert_parallel": 0}, "engine.expert_parallel is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_work(options, words, tmp_path):
    given = {"engine__zero_stage": 2, "engine__expert_parallel": 2} | options
    with pytest.raises(ConfigError, match=words):
        check(make_config(tmp_path, tmp_path, tmp_path / "data.json", **given))
