"""All twelve benchmarks from local files, through lmms-eval's own tasks and scorers; what fails takes nothing along."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

import datasets
import tenacity
from benchmark_files import EXPECTED, answer_to, write_benchmarks

from libmoe_fast import columns
from libmoe_fast.analysis.report import dropped_table, weights_table
from libmoe_fast.analysis.runs import find_runs
from libmoe_fast.answers import AnswerStore
from libmoe_fast.cli import main
from libmoe_fast.evaluate import EvaluateConfig, evaluate
from libmoe_fast.lmms import LibMoEFast


class Judge(BaseHTTPRequestHandler):
    """Answers like a chat API: "correct" to what says that it is right, a number where one is to be extracted."""

    asked: list[str]
    broken = False

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        self.asked.append(prompt)
        extract = "Extracted answer" in prompt or "extract" in prompt.lower()
        word = "7" if extract else "correct" if "is right" in prompt else "incorrect"
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "usage": None}
        body["choices"] = [{"index": 0, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"}]
        content = json.dumps(body).encode()
        self.send_response(500 if type(self).broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def judge():
    """A server on this machine, whose address lmms-eval's scorers read when they are imported."""
    Judge.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = {"OPENAI_API_URL": f"http://127.0.0.1:{server.server_port}/v1", "OPENAI_API_KEY": "none"}
    before = {name: os.environ.get(name) for name in address}
    os.environ.update(address)
    yield Judge
    server.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def answers(monkeypatch):
    """The model answers as benchmark_files says; what was asked of it is kept."""
    asked = []
    generate = LibMoEFast._generate

    def told(self, prompts, settings):
        asked.extend(prompt.text for prompt in prompts)
        lines = generate(self, prompts, {**settings, "max_new_tokens": 1})
        return [{**line, "answer": answer_to(prompt.text)} for line, prompt in zip(lines, prompts, strict=True)]

    monkeypatch.setattr(LibMoEFast, "_generate", told)
    return asked


@pytest.fixture(scope="module")
def checkpoint(checkpoints):
    return checkpoints / "smoe" / "final"


def test_all_twelve_columns(judge, hub, answers, checkpoint, tmp_path):
    """Then again: nothing is asked twice, neither of the model nor of the judge."""
    config = EvaluateConfig(suite="libmoe", hub_folder=str(hub), out=str(tmp_path), batch_size=3)
    outcome = evaluate(checkpoint, config)
    assert outcome.failures == {}
    assert outcome.scores == pytest.approx(EXPECTED)
    assert list(outcome.scores) == list(columns.SUITES["libmoe"])
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["scores"] == outcome.scores
    assert len(answers) == 2 * 13
    judged = len(judge.asked)
    assert judged == 2 + 1  # HallusionBench once for its three metrics, and MathVista's second answer
    answers.clear()
    assert evaluate(checkpoint, config).scores == outcome.scores
    assert answers == []
    assert len(judge.asked) == judged + 1  # MathVista keeps nothing


def test_a_column_that_fails_keeps_the_others(hub, answers, checkpoint, tmp_path, monkeypatch, capsys):
    """Documents without an answer in the middle of the list, and files that are not there: a line each, at the end."""
    hub, out = shutil.copytree(hub, tmp_path / "hub"), tmp_path / "out"
    monkeypatch.setattr(tenacity.nap, "time", types.SimpleNamespace(sleep=lambda _: None))
    (file,) = (hub / "lmms-lab-encoder" / "POPE").glob("data/*.parquet")
    datasets.Dataset.from_parquet(str(file)).remove_columns("answer").to_parquet(file)
    shutil.rmtree(hub / "Lin-Chen" / "MMStar")
    command = ["evaluate", str(checkpoint), "--hub_folder", str(hub), "--out", str(out)]
    code = main([*command, "--tasks", "AI2D", "POPE", "MMStar", "GQA"])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("libmoe-fast")]
    stored = json.loads((out / "results.json").read_text())
    assert stored["scores"] == {"AI2D": 50.0, "GQA": 50.0}
    assert code == 1
    assert len(lines) == 2
    assert "pope failed: lmms-eval gave up on pope (KeyError: 'answer')" in lines[0]
    assert "lmms-eval gave up on mmstar" in lines[1]
    assert {"AI2D: 50.00", "GQA: 50.00"} <= set(printed.out.splitlines())
    assert stored["failures"].keys() == {"pope", "mmstar"}
    # Mended: MMStar is there now. What has been answered is not asked again.
    write_benchmarks(tmp_path / "again")
    shutil.move(tmp_path / "again" / "Lin-Chen" / "MMStar", hub / "Lin-Chen" / "MMStar")
    answers.clear()
    config = {"tasks": ["AI2D", "POPE", "MMStar"], "hub_folder": str(hub), "out": str(out)}
    outcome = evaluate(checkpoint, EvaluateConfig(**config))
    assert outcome.scores == {"AI2D": 50.0, "MMStar": 50.0}
    assert outcome.failures.keys() == {"pope"}
    assert len(answers) == 2
    assert all("MMStar" in prompt for prompt in answers)
    assert json.loads((out / "results.json").read_text())["scores"] == {"AI2D": 50.0, "GQA": 50.0, "MMStar": 50.0}


@pytest.mark.parametrize("column", ["Hallusion", "MathVista", "MMBench EN (judge)"])
def test_a_failed_judgement_is_no_score(column, judge, hub, answers, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between tries
    monkeypatch.setattr(judge, "broken", True)
    if column.startswith("MMBench"):
        answer = answer_to
        monkeypatch.setattr("benchmark_files.answer_to", answer)
        monkeypatch.setattr("test_suite.answer_to", lambda prompt: "hard to say")
    config = {"tasks": [column], "hub_folder": str(hub), "out": str(tmp_path)}
    outcome = evaluate(checkpoint, EvaluateConfig(**config))
    assert outcome.scores == {}
    (reason,) = outcome.failures.values()
    number = 1 if column == "MathVista" else 2
    assert reason.startswith(f"{number} of 2 answers were not judged")
    with pytest.warns(UserWarning, match=f"{number} of 2 answers were not judged"):
        taken = evaluate(checkpoint, EvaluateConfig(**config, accept_failed_judgements=True))
    assert set(taken.scores) == {column}
    # The judge answers again: what it failed to say is asked, and the column has its score.
    monkeypatch.setattr(judge, "broken", False)
    if not column.startswith("MMBench"):
        assert evaluate(checkpoint, EvaluateConfig(**config)).scores == {column: 50.0}


def test_without_a_key_judged_columns_are_refused_before_anything_runs(checkpoint, hub, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = {"suite": "libmoe", "hub_folder": str(hub), "out": str(tmp_path)}
    with pytest.raises(columns.ConfigError, match="skip_judged"):
        evaluate(checkpoint, EvaluateConfig(**config))
    assert not list(tmp_path.iterdir())


def test_skip_judged(answers, hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = EvaluateConfig(tasks=["POPE", "Hallusion"], skip_judged=True, hub_folder=str(hub), out=str(tmp_path))
    assert set(evaluate(checkpoint, config).scores) == {"POPE"}


# ---------------------------------------------------------------------------------------------------------------------
# Killed, batched, shared


@pytest.fixture(scope="module")
def whole(checkpoint, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    config = EvaluateConfig(tasks=["digit"], include_path=[str(digits.tasks)], out=str(out), batch_size=8)
    evaluate(checkpoint, config)
    return out


def test_without_each_tokens_first_expert(checkpoint, digits, tmp_path):
    """Beside the evaluation of the whole model, whose scores stay: one expert fewer per token, answers of its own."""
    shutil.copytree(checkpoint, tmp_path / "run" / "final")
    command = ["evaluate", str(tmp_path / "run" / "final"), "--tasks", "digit", "--include_path", str(digits.tasks)]
    assert main(command) == 0
    assert main([*command, "--drop_top1"]) == 0
    whole, less = (routing(tmp_path / "run" / name) for name in ("eval", "eval-without-top1"))
    choices = [[sum(map(sum, task["counts"])) for task in found["tasks"].values()] for found in (whole, less)]
    assert [2 * n for n in choices[1]] == choices[0]  # top_k is 2
    (run,) = find_runs(tmp_path / "run")
    assert run.scores.keys() == run.without_top1.keys() == {"digit"}
    assert run.evaluations == [tmp_path / "run" / "eval"]
    _, rows, _ = dropped_table([run])
    assert rows[0][:2] == ["run", "digit"]


def test_outputs_and_weights_right_after_upcycling(checkpoint, digits, tmp_path):
    """Experts that are still copies agree in all they say; comparing them is asked for, and asks again."""
    dense = checkpoint.parent.parent / "dense" / "final"
    shutil.copytree(checkpoint, tmp_path / "run" / "final")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {json.dumps(str(dense))}}}\n")
    command = ["evaluate", str(tmp_path / "run" / "final"), "--tasks", "digit", "--include_path", str(digits.tasks)]
    assert main(command) == 0
    (run,) = find_runs(tmp_path / "run")
    assert run.routing_by_task()[0]["similarity"] is None
    assert main([*command, "--record_outputs"]) == 0
    (run,) = find_runs(tmp_path / "run")
    assert run.routing_by_task()[0]["similarity"] == pytest.approx(1.0, abs=1e-5)
    _, ((name, router, moved, apart, _most),), _ = weights_table([run])
    assert (name, router, moved, apart) == ("run", "smoe", "0.0000", "0.0000")


def routing(folder: Path) -> dict:
    return json.loads((folder / "routing.json").read_text())


def test_killed_in_the_middle_the_same_numbers_after(whole, checkpoint, digits, tmp_path):
    command = [sys.executable, "-m", "libmoe_fast.cli", "evaluate", str(checkpoint), "--tasks", "digit"]
    command += ["--include_path", str(digits.tasks), "--out", str(tmp_path), "--batch_size", "2"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_TWO_BATCHES, *command[3:]], capture_output=True, timeout=900
    )
    assert killed.returncode == -signal.SIGKILL
    (file,) = (tmp_path / "answers").iterdir()
    assert len(file.read_text().splitlines()) == 4
    assert not (tmp_path / "results.json").exists()
    with file.open("a") as cut:
        cut.write('{"run": "half a li')
    assert main(command[3:]) == 0
    for name in ("scores", "questions", "results"):
        one, other = (json.loads((folder / "results.json").read_text())[name] for folder in (whole, tmp_path))
        assert one == other
    same(routing(whole), routing(tmp_path))


KILLED_AFTER_TWO_BATCHES = """
import os, signal, sys
from libmoe_fast.answers import AnswerStore
from libmoe_fast.cli import main
add, seen = AnswerStore.add, []
def counted(self, *line):
    add(self, *line)
    seen.append(line)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
AnswerStore.add = counted
main(sys.argv[1:])
"""


def same(one: dict, other: dict) -> None:
    """Equal counts; sums of probabilities to rounding."""
    assert one["layers"] == other["layers"]
    assert one["tasks"].keys() == other["tasks"].keys()
    for task, tally in one["tasks"].items():
        theirs = other["tasks"][task]
        assert tally["counts"] == theirs["counts"]
        assert tally["categories"].keys() == theirs["categories"].keys()
        for mine, yours in zip(tally["gates"], theirs["gates"], strict=True):
            assert mine == pytest.approx(yours, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_records_do_not_depend_on_the_batch(batch_size, whole, checkpoint, digits, tmp_path):
    config = EvaluateConfig(tasks=["digit"], include_path=[str(digits.tasks)], out=str(tmp_path), batch_size=batch_size)
    evaluate(checkpoint, config)
    same(routing(whole), routing(tmp_path))


def test_answers_of_other_runs_are_not_taken(tmp_path):
    """Another checkpoint, another setting, another text of the question: another answer."""
    store = AnswerStore(tmp_path, {"checkpoint": 1})
    store.add("task", store.key("task", 0, "what?"), {"answer": "a"})
    store.close()
    again, other = AnswerStore(tmp_path, {"checkpoint": 1}, rank=1), AnswerStore(tmp_path, {"checkpoint": 2})
    assert again.get(again.key("task", 0, "what?"))["answer"] == "a"
    assert again.get(again.key("task", 0, "why?")) is None
    assert other.get(other.key("task", 0, "what?")) is None
    assert other.get(again.key("task", 0, "what?")) is None
