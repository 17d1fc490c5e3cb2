"""The set-up script, with pip replaced: a step that fails is named with its cause, and the next run goes on there."""

import sys

import install
import pytest

STEPS = ["virtual environment", "build tools", "torch", "all other packages", "libmoe_fast and its C++ extension"]


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "gpu.lock"
    path.write_text("torch==2.15.0\n")
    return path


@pytest.fixture
def setup(tmp_path, lock, monkeypatch):
    """Runs a set-up whose commands are a list; `failing` is the step whose command fails, with pip's `output`."""

    def run(environment="gpu", failing=None, output=""):
        done = []

        def do(step):
            def call():
                done.append(step.name)
                (tmp_path / "venv").mkdir(exist_ok=True)
                if step.name == "virtual environment":
                    (tmp_path / "venv" / ".kind").write_text(step.made_from)
                if step.name == failing:
                    code = f"import sys; print({output!r}); sys.exit(1)"
                    self.call(sys.executable, "-c", code)

            return install.Step(step.name, step.made_from, call)

        self = install.Setup(environment, tmp_path / "venv", lock)
        steps = [do(step) for step in self.steps()]
        monkeypatch.setattr(self, "steps", lambda: steps)
        try:
            self.run()
        except install.SetupError as error:
            return done, str(error)
        return done, None

    return run


def test_every_step_is_done_once(setup):
    assert setup() == (STEPS, None)
    assert setup() == ([], None)


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying: NewConnectionError: Temporary failure in name resolution\n"
            "ERROR: No matching distribution found for torch==2.15.0",
            "index could not be reached",
        ),
        ("ERROR: No matching distribution found for zss==1.2.0", "does not have zss==1.2.0"),
        ("something else", "exited with 1"),
    ],
    ids=["disk", "network", "package", "unknown"],
)
def test_a_step_that_fails_is_named_and_taken_up_again(setup, output, cause):
    done, error = setup(failing="all other packages", output=output)
    assert done == STEPS[:4]
    assert "step 4 of 5 (all other packages) failed" in error
    assert cause in error
    assert setup() == (STEPS[3:], None)


def test_a_moved_lock_is_installed(setup, lock):
    setup()
    lock.write_text("torch==2.15.1\n")
    assert setup() == (STEPS[1:], None)


def test_another_environment_in_the_same_folder_is_refused(setup):
    setup()
    done, error = setup(environment="cpu")
    assert done == []
    assert "make distclean" in error


def test_a_cpu_environment_refuses_a_torch_with_cuda(tmp_path, lock, monkeypatch):
    setup = install.Setup("cpu", tmp_path / "venv", lock)
    version = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "torch" / "version.py"
    version.parent.mkdir(parents=True)
    monkeypatch.setattr(setup, "pip", lambda *arguments: None)
    version.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    setup.install_torch()
    version.write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    with pytest.raises(install.SetupError, match="PIP_EXTRA_INDEX_URL"):
        setup.install_torch()
