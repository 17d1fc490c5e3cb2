"""The check of a GPU, on small steps: whatever becomes of one, it is said by name and the rest goes on."""

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from libmoe_fast.kernels import device_check
from libmoe_fast.kernels.device_check import FAILED, LEFT_OUT, PASSED, Place, Step, check, main, suite

ONE_OF_TWO = """
def test_right():
    pass

def test_wrong():
    raise AssertionError("wrong: dx: 1.00e+00, PyTorch's own 2.00e-01")
"""


def script(name: str, code: str, seconds: int = 60) -> Step:
    """A step that runs `code` and passes if that does."""
    return Step(
        name=name,
        about="",
        seconds=seconds,
        command=lambda place: [sys.executable, "-c", code],
        read=lambda place, output, status: (FAILED if status else PASSED, output.strip(), [{"number": 1.5}]),
    )


@pytest.fixture
def place(tmp_path):
    return Place(out=tmp_path / "out", cache=tmp_path / "cache", dry=True, workers=1)


def test_a_failing_test_is_named_and_the_rest_goes_on(place, tmp_path):
    file = tmp_path / "test_kernels.py"
    file.write_text(ONE_OF_TWO)
    verdicts = check(place, [suite("correct", "", 120, str(file)), script("speed", "print('fast')")], limit=200)
    assert [verdict.status for verdict in verdicts] == [FAILED, PASSED]
    assert verdicts[0].summary.startswith("1 passed, 1 failed")
    assert "test_wrong: AssertionError: wrong: dx" in verdicts[0].summary
    assert "fast" in (place.out / "log.txt").read_text()


def test_tests_that_do_not_start_are_a_failure(place):
    (verdict,) = check(place, [suite("correct", "", 120, "no_such_file.py")], limit=200)
    assert verdict.status == FAILED
    assert verdict.summary.startswith("no tests ran")


def test_tests_that_are_all_skipped_prove_nothing(place, tmp_path):
    file = tmp_path / "test_kernels.py"
    file.write_text("import pytest\n@pytest.mark.skip\ndef test_skipped(): pass")
    (verdict,) = check(place, [suite("correct", "", 120, str(file))], limit=200)
    assert (verdict.status, verdict.summary) == (FAILED, "1 skipped")


def test_a_step_that_hangs_is_stopped(place):
    hangs = script("hangs", "import time; print('compiling', flush=True); time.sleep(600)", seconds=2)
    verdicts = check(place, [hangs, script("next", "")], limit=200)
    assert [verdict.status for verdict in verdicts] == [FAILED, PASSED]
    assert verdicts[0].summary == "stopped after 2 s; its last line: compiling"


def test_what_there_is_no_time_for_is_left_out(place):
    verdicts = check(place, [script("slow", "import time; time.sleep(600)"), script("next", "")], limit=2)
    assert [verdict.status for verdict in verdicts] == [FAILED, LEFT_OUT]
    assert verdicts[1].summary == "no time was left"


def test_a_step_that_cannot_run_here_says_why(place):
    step = replace(script("ncu", ""), reason=lambda place: "ncu is not on PATH")
    (verdict,) = check(place, [step], limit=100)
    assert (verdict.status, verdict.summary) == (LEFT_OUT, "ncu is not on PATH")


def test_files_hold_every_number(place):
    check(place, [script("tiles", "print('ok')")], limit=100)
    results = json.loads((place.out / "results.json").read_text())
    assert results["machine"]["torch"]
    (step,) = results["steps"]
    assert (step["step"], step["status"], step["data"]) == ("tiles", PASSED, [{"number": 1.5}])
    summary = (place.out / "summary.md").read_text()
    assert "Triton's interpreter" in summary
    assert "| number |" in summary
    assert "| 1.5 |" in summary
    assert sorted(file.name for file in place.out.iterdir()) == ["log.txt", "results.json", "summary.md"]


@pytest.mark.parametrize(("code", "expected"), [("", 0), ("import sys; sys.exit(3)", 1)])
def test_exit_status(code, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device_check, "STEPS", (script("tiles", code),))
    assert main(["--dry-run", "--out", str(tmp_path)]) == expected
    assert f"{expected} of 1 steps failed" in capsys.readouterr().out


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(device_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "--dry-run" in capsys.readouterr().err
