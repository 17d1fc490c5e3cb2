"""SIGKILL at any moment, and the same command again: the same losses as a run left in peace."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import computed, write_data, write_model


def test_killed_runs_end_with_the_same_losses(tmp_path):
    model = write_model(tmp_path / "model", dropout=0.1)  # the random state counts as well
    data = write_data(tmp_path / "data", images=13, texts=11)
    script = Path(__file__).with_name("kill_runs.py")
    subprocess.run([sys.executable, script, tmp_path, model, data], check=True, timeout=900)
    whole = computed(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(1, 13))
    assert {line["top_k"] for line in whole} == {1, 2}  # the hyper router's K rose on the way
    assert any(line["expert_share"] == {} for line in whole)  # a text-only step was among them
    assert computed(tmp_path / "killed") == whole
    finals = [load_file(tmp_path / name / "final" / "libmoe_fast.safetensors") for name in ("whole", "killed")]
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert [p.name for p in (tmp_path / "killed").glob(".*") if p.name != ".lock"] == []  # nothing half-written is left
