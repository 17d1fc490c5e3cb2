"""The doctor's report: right here, and right where things are missing."""

import json
import platform

import pytest
import torch

from libmoe_fast import doctor, extension, ops


def test_json_is_what_collect_gives(capsys):
    assert doctor.run(json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == doctor.collect()
    assert report["python"] == platform.python_version()
    assert torch.__version__.startswith(report["packages"]["torch"])
    assert report["extension"]["loaded"] is extension.load().loaded
    assert report["extension"]["running_torch"] == torch.__version__
    assert report["cuda_extension"]["loaded"] is extension.load_cuda().loaded
    assert set(report["backends"]) == set(ops.available_backends())
    assert report["backends"]["reference"] == {"usable": True, "problem": None}
    assert report["cuda"]["available"] is torch.cuda.is_available()


def test_the_table_has_every_backend_and_version(capsys):
    assert doctor.run() == 0
    table = capsys.readouterr().out
    for name in (*ops.available_backends(), *doctor.PACKAGES, torch.__version__, platform.python_version()):
        assert name in table


def test_an_extension_that_does_not_load_is_explained(capsys, monkeypatch):
    broken = extension.ExtensionState(
        loaded=False, path="_cpu.abi3.so", reason="an undefined symbol", hint="rebuild it", built_with="2.13.0"
    )
    monkeypatch.setattr(extension, "load", lambda: broken)
    backends = {"reference": None, "cpu": "an undefined symbol; rebuild it"}
    monkeypatch.setattr(ops, "available_backends", lambda: backends)
    assert doctor.run() == 0
    table = capsys.readouterr().out
    assert "not loaded" in table
    assert "an undefined symbol" in table
    assert "rebuild it" in table
    assert doctor.collect()["backends"]["cpu"]["usable"] is False


def test_a_missing_cuda_part_is_explained(capsys, monkeypatch):
    missing = extension.ExtensionState(loaded=False, reason="it was not built", hint="install nvcc")
    monkeypatch.setattr(extension, "load_cuda", lambda: missing)
    assert doctor.run() == 0
    section = capsys.readouterr().out.split("C++ extension, CUDA part")[1].split("backends")[0]
    assert "it was not built" in section
    assert "install nvcc" in section


def test_nothing_usable_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(ops, "available_backends", lambda: {"reference": "broken"})
    assert doctor.run() == 1
    assert "broken" in capsys.readouterr().out


def test_missing_tools_and_packages_are_said_to_be_missing(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(doctor, "PACKAGES", ("libmoe_fast", "torch", "no-such-distribution"))
    doctor.run()
    table = capsys.readouterr().out
    assert "not found" in table
    assert "no-such-distribution  not installed" in table


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpus_are_listed(capsys):
    doctor.run()
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out
