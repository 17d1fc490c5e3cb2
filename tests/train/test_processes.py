"""Two processes compute what one does: losses, and gradients with the auxiliary losses in them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process_runs import OTHER_PROCESSES, stop_after_first_step
from safetensors.torch import load_file
from tiny_runs import computed, make_config, write_data, write_model

from libmoe_fast import ConfigError, load_model
from libmoe_fast.train.held_out import read_held_out
from libmoe_fast.train.loop import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    model = write_model(folder / "model")
    images, mixed = write_data(folder / "images", images=24, texts=0), write_data(folder / "mixed", images=3, texts=3)
    held_out = write_data(folder / "held-out", images=3, texts=2)  # an odd number: one process has a pass too few
    for stage in (1, 2, 3):
        begun = make_config(
            folder / f"two/one_to_two_{stage}", model, images, **OTHER_PROCESSES, engine__zero_stage=stage
        )
        stop_after_first_step(begun, rank="0")
    script = Path(__file__).with_name("process_runs.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, script, folder / "two", model, images, mixed, held_out], check=True, timeout=900)
    train(make_config(folder / "one", model, images, data__held_out=str(held_out), run__export_at=[0.4]))
    options = {"optim__batch_size": 2, "optim__max_steps": None, "model__balance_coef": 0.0, "model__z_coef": 0.0}
    train(make_config(folder / "one_mixed", model, mixed, **options))
    train(make_config(folder / "other", model, images, **OTHER_PROCESSES))
    return folder


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_processes_equal_one(stage, runs):
    expected, lines = computed(runs / "one"), computed(runs / "two" / stage)
    assert len(lines) == len(expected) == 3
    for line, same in zip(lines, expected, strict=True):
        shares, other = line.pop("expert_share"), same.pop("expert_share")
        assert line == pytest.approx(same, rel=2e-4)
        assert list(shares) == list(other)
        for layer in shares:
            assert shares[layer] == pytest.approx(other[layer], abs=0.02)


def test_held_out_loss_of_two_processes(runs):
    one, two, stopped = (read_held_out(runs / name) for name in ("one", "two/zero3", "two/stopped"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 3]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=2e-4)
    assert stopped == two


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("way", ["one_to_two", "two_to_one"])
def test_a_run_goes_on_with_another_number_of_processes(way, stage, runs, capsys):
    """Through the same samples, to the same losses, weights and biases; only how a step is cut has to be said anew."""
    run = runs / "two" / f"{way}_{stage}"
    if way == "two_to_one":
        config = make_config(
            run, runs / "model", runs / "images" / "data.json", **OTHER_PROCESSES, engine__zero_stage=stage
        )
        config.optim.batch_size = 4  # of 8, as before: 2 x 2 x 2 processes
        with pytest.raises(ConfigError, match=r"optim\.batch_size was 2 and is 4, optim\.accumulation was 2 and is 1"):
            train(config)
        config.optim.accumulation = 2
        train(config)
        assert "was written by 2 processes, and is cut anew for 1" in capsys.readouterr().out
    lines, expected = computed(run), computed(runs / "other")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for name in ("loss", "grad_norm", "balance_loss", "lr"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=5e-4), name
    final = load_model(run / "final").state_dict()
    for name, value in load_model(runs / "other" / "final").state_dict().items():
        assert ((final[name] - value).abs() > 1e-3).float().mean() < 0.05, name
        if name.endswith("router.bias"):
            assert value.any()
            torch.testing.assert_close(final[name], value)
    assert not list(run.rglob("*partial*"))


def test_zero3_exports_whole_weights(runs):
    zero3 = load_model(runs / "two" / "zero3" / "final").state_dict()
    for name, value in load_model(runs / "one" / "final").state_dict().items():
        assert zero3[name].shape == value.shape
        assert ((zero3[name] - value).abs() > 1e-3).float().mean() < 0.05, name


def test_stopped_on_one_process_goes_on_as_if_never_stopped(runs):
    assert computed(runs / "two" / "stopped") == computed(runs / "two" / "zero3")
    finals = [load_file(runs / "two" / name / "final" / "libmoe_fast.safetensors") for name in ("stopped", "zero3")]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[1])


def test_image_on_one_process_text_on_the_other(runs):
    lines, expected = computed(runs / "two" / "mixed"), computed(runs / "one_mixed")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=2e-4)
    assert sum(line["balance_loss"] is None for line in lines) == 1  # of images, of texts, of both


def test_a_schedulers_sigterm_under_torchrun_loses_nothing(tmp_path):
    """torchrun sends it to the whole group of each process, with those in it that load images."""
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data", images=24, texts=0)
    options = {
        **{"run.folder": tmp_path / "run", "run.log_every": 1, "model.path": model, "model.stage": 3},
        **{"data.file": data, "data.workers": 1, "data.max_length": 64, "optim.batch_size": 2, "optim.epochs": 10**6},
        **{"engine.dtype": "fp32", "engine.zero_stage": 0, "engine.checkpointing": "off"},
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "libmoe_fast.train", *(f"--{name}={value}" for name, value in options.items())]
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
        log = tmp_path / "run" / "log.jsonl"
        while launcher.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=300)
    said = (tmp_path / "out.txt").read_text()
    assert said.count("stopped and saved after step") == 2, said[-2000:]
    steps = computed(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step-{steps}"
