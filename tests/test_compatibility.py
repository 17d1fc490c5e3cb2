"""Known-bad combinations of versions: each is named with its remedy, and what works is left alone."""

import importlib.metadata

import pytest
from packaging.specifiers import SpecifierSet

from libmoe_fast import compatibility, doctor
from libmoe_fast.compatibility import problems

GOOD = {"torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.3.5", "lmms-eval": "0.7.3", "filelock": "3.32.7"}


def test_good_versions_have_no_problems():
    assert problems(GOOD) == []
    assert problems({}) == []


@pytest.mark.parametrize(
    ("changed", "named", "mend"),
    [
        # what broke `make demo` three days after the last commit
        ({"filelock": "4.3.1"}, "lmms-eval 0.7.3 with filelock 4.3.1", 'pip install "filelock<4"'),
        # what pip gives a user of torch 2.11
        ({"numpy": "2.4.6"}, "triton 3.6.0 with numpy 2.4.6", 'pip install "numpy<2.4"'),
        ({"torch": "2.8.0"}, "torch 2.8.0 is older than the oldest that was tested", 'pip install "torch>=2.9"'),
        ({"deepspeed": "1.0"}, "deepspeed 1.0 is newer than the newest that was tested", 'pip install "deepspeed=='),
        ({"triton": "4.0.0"}, "triton 4.0.0 is newer than the newest that was tested", 'pip install "triton=='),
    ],
)
def test_a_bad_combination_is_named_with_its_remedy(changed, named, mend):
    (problem,) = problems({**GOOD, **changed})
    assert named in problem.problem
    assert mend in problem.mend


@pytest.mark.parametrize("version", ["2.15.3", "2.15.0+cu132", "2.15.0a0+git1234567"])
def test_patches_and_builds_of_the_newest_count_as_tested(version, monkeypatch):
    monkeypatch.setitem(compatibility.TESTED, "torch", ("2.9", "2.15"))
    assert problems({"torch": version}) == []


def test_a_version_that_is_none_is_no_problem():
    assert problems({"torch": "of my own"}) == []


@pytest.fixture
def torchvision(monkeypatch):
    """Pretends that a torchvision with certain requirements is installed, and a torch of some version."""

    def pretend(requirement, torch):
        versions = {"torchvision": "0.26.0", "torch": torch}
        monkeypatch.setattr(compatibility, "installed_version", versions.get)
        monkeypatch.setattr(importlib.metadata, "requires", {"torchvision": ["numpy", requirement]}.get)

    return pretend


def test_a_torchvision_for_another_torch(torchvision, monkeypatch):
    monkeypatch.setattr(compatibility, "_cuda_of", lambda name: "13")
    torchvision("torch==2.11.0", torch="2.13.0+cu130")
    (problem,) = problems()
    assert problem.problem == "torchvision 0.26.0 was built for torch==2.11.0, and here is 2.13.0+cu130"
    assert problem.mend == "pip install --upgrade torchvision torch==2.13.0"
    torchvision("torch==2.13.0", torch="2.13.0+cu130")
    assert problems() == []


def test_a_torchvision_with_cuda_beside_a_torch_without(torchvision, monkeypatch):
    torchvision("torch==2.13.0", torch="2.13.0+cpu")
    monkeypatch.setattr(compatibility, "_cuda_of", {"torch": "", "torchvision": "13"}.get)
    (problem,) = problems()
    assert "torch for the CPU and torchvision for CUDA 13" in problem.problem
    assert problem.mend == "pip install --force-reinstall torch torchvision"


def test_the_doctor_names_them(monkeypatch, capsys):
    bad = compatibility.Problem(problem="oil with water", mend="pip install soap")
    monkeypatch.setattr(compatibility, "problems", lambda: [bad])
    assert doctor.run() == 0
    table = capsys.readouterr().out
    assert "oil with water" in table
    assert "what to do: pip install soap" in table
    assert doctor.collect()["known_problems"] == [{"problem": "oil with water", "mend": "pip install soap"}]


@pytest.mark.parametrize("bad", compatibility.BAD_COMBINATIONS, ids=lambda bad: "+".join(bad.versions))
def test_ranges_are_specifiers(bad):
    assert all(str(SpecifierSet(specifier)) for specifier in bad.versions.values())
