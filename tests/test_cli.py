"""The command line: every mistake is one line and exit code 2, help teaches, and starting is light."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from libmoe_fast import compatibility
from libmoe_fast.cli import main

pytest.importorskip("jsonargparse")

COMMANDS = ("plan", "train", "data", "evaluate", "report", "convert", "bench", "doctor")


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail; returns its one line."""

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("libmoe-fast: error: ")
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evalute"], "evalute"),
        (["report"], "folder"),
        (["report", "nowhere"], "no folder nowhere"),
        (["report", "nowhere", "--width", "3"], "--width"),
        (["bench", "--preset", "quik"], "quik"),
        (["bench", "--device", "tpu"], "tpu"),
        (["bench", "--threads", "0"], "threads is 0"),
        (["bench", "--threads", "100000000000000"], "threads is 100000000000000"),
        (["bench", "--compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
        (["bench", "--compare", "nowhere.json"], "compare"),
        (["doctor", "--jsn"], "--jsn"),
        (["evaluate"], "checkpoint"),
        (["evaluate", "nowhere", "--tasks", "mme"], "no checkpoint folder nowhere"),
        (["evaluate", "nowhere", "--batch_size", "many"], "batch_size"),
        (["evaluate", "nowhere", "--dtype", "fp7"], "dtype"),
        (["train", "--config", "stage9"], "stage9"),
        (["train", "--model.routr", "smoe"], "routr"),
        (["train", "--optim.lr", "fast"], "lr"),
        (["train", "--config", "clip_phi3_stage1"], "run.folder"),
    ],
)
def test_wrong_arguments(fails, arguments, expected):
    assert expected in fails(*arguments)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.router", "smore"], "smore"),
        (["--model.num_experts", "2", "--model.top_k", "3"], "3"),
        (["--model.targets", "[text]"], "unknown upcycle target 'text'"),
        (["--model.router_options", "{heat: 2}"], "heat"),
        (["--optim.lr", "-1"], "optim.lr is -1"),
    ],
)
def test_wrong_moe_options_are_refused_before_anything_is_loaded(fails, tmp_path, options, expected):
    basics = ["--model.path", tmp_path, "--data.file", tmp_path / "x.json", "--run.folder", tmp_path / "run"]
    assert expected in fails("train", "--config", "clip_phi3_stage3", *basics, *options)
    assert not (tmp_path / "run").exists()


# Nine levels of ten aliases each: 10^9 values in 300 bytes.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: {routr: smoe}", "routr"),
        (b"optim: {lr: fast}", "lr"),
        (b"model: [", "mine.yaml is not YAML"),
        (b"", "mine.yaml is empty"),
        (b"model: {stage: 1", "mine.yaml is not YAML"),
        (b"- 1", "mine.yaml holds a list"),
        (b"config: /etc/hostname", "mine.yaml has an option 'config'"),
        (b"run: {seed: 1" + b"9" * 6000 + b"}", "mine.yaml is not YAML: Exceeds the limit"),
        (b"run: {folder: 2021-02-30}", "mine.yaml is not YAML: day is out of range"),
        ("run: {seed: 1}".encode("utf-16"), "mine.yaml is not UTF-8"),
        (b"[" * 2000, "mine.yaml is nested"),
        (ALIASES.encode(), "once its aliases are written out"),
        (b"a: &a [*a]", "once its aliases are written out"),
        (b"#" * 2**21, "mine.yaml is 2,097,152 bytes long"),
    ],
    ids=lambda value: None if isinstance(value, str) else value[:12].decode("latin-1"),
)
def test_wrong_config_files(fails, tmp_path, content, expected):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    assert expected in fails("train", "--config", file)


def test_a_config_file_that_never_ends(fails, tmp_path):
    os.mkfifo(tmp_path / "mine.yaml")
    assert "mine.yaml is a pipe" in fails("train", "--config", tmp_path / "mine.yaml")
    assert "is a folder" in fails("train", "--config", tmp_path)


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ([], "no task given"),
        (["digit", "Hallusion"], "OPENAI_API_KEY is not set"),
        (["mathvista_testmini_format"], "OPENAI_API_KEY is not set"),
        (["digits_digt"], "did you mean digits_digit"),
    ],
)
def test_tasks_that_cannot_run_are_refused(fails, checkpoints, digits, monkeypatch, tasks, expected):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    named = ["--tasks", *tasks] if tasks else []
    assert expected in fails("evaluate", checkpoints / "smoe" / "final", *named, "--include_path", digits.tasks)


def test_a_benchmark_that_cannot_be_downloaded(checkpoints, digits, monkeypatch, tmp_path, capsys):
    """One line where lmms-eval's own error has 100; the other column has its score, and the exit code is 1."""
    import datasets.config
    import tenacity.nap

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(tenacity.nap, "time", types.SimpleNamespace(sleep=lambda _: None))
    command = ["evaluate", checkpoints / "smoe" / "final", "--tasks", "POPE", "digit", "--out", tmp_path]
    assert main([str(a) for a in [*command, "--include_path", digits.tasks, "--limit", 2]]) == 1
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("libmoe-fast")]
    assert "lmms-eval gave up on pope" in line
    assert "hf auth login" in line
    assert "digit: " in printed.out


def test_missing_task_folder(fails, checkpoints):
    command = ["evaluate", checkpoints / "smoe" / "final", "--tasks", "x", "--include_path", "nowhere"]
    assert "no folder nowhere" in fails(*command)


def test_folders_that_are_no_checkpoint(fails, checkpoints, tmp_path):
    assert "is not a checkpoint" in fails("evaluate", tmp_path, "--tasks", "digit")
    assert "did you mean" in fails("evaluate", checkpoints / "smoe", "--tasks", "digit")
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in fails("evaluate", tmp_path, "--tasks", "digit")


def test_truncated_checkpoint(fails, checkpoints, digits, tmp_path):
    for file in (checkpoints / "smoe" / "final").iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    line = fails("evaluate", tmp_path, "--tasks", "digit", "--include_path", digits.tasks)
    assert "truncated" in line
    assert not (tmp_path.parent / "eval").exists()


def test_a_full_disk_is_one_line(fails, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "results.json")

    monkeypatch.setattr("libmoe_fast.analysis.report.make_report", full)
    assert "cannot write results.json: No space left" in fails("report", "x")


def test_an_error_in_the_program_is_not_hidden(monkeypatch):
    def broken(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file", "x")

    monkeypatch.setattr("libmoe_fast.analysis.report.make_report", broken)
    with pytest.raises(FileNotFoundError):
        main(["report", "x"])


def test_interruption_is_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt("saved at step 7")

    monkeypatch.setattr("libmoe_fast.analysis.report.make_report", interrupt)
    assert main(["report", "x"]) == 130
    assert "saved at step 7" in capsys.readouterr().err


def test_an_evaluation_that_cannot_start_names_the_versions_at_fault(fails, checkpoints, monkeypatch):
    """filelock 4 beside lmms-eval 0.7.3: its import error alone tells nobody what to do."""
    pytest.importorskip("lmms_eval")
    bad = compatibility.Problem(problem="lmms-eval 0.7.3 with filelock 4.3.1", mend='pip install "filelock<4"')
    monkeypatch.setattr(compatibility, "problems", lambda: [bad])
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)  # importing it raises ImportError
    line = fails("evaluate", checkpoints / "smoe" / "final", "--tasks", "pope")
    assert "lmms-eval 0.7.3 with filelock 4.3.1" in line
    assert 'pip install "filelock<4"' in line


def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["reference"]["usable"]


@pytest.fixture
def trained_with(monkeypatch):
    """Runs `train` with the loop replaced; returns the config the loop would have got."""

    def run(*arguments):
        seen = []
        monkeypatch.setattr("libmoe_fast.train.loop.train", seen.append)
        basics = ["--model.path", "m", "--data.file", "d.json", "--run.folder", "r"]
        assert main(["train", *map(str, arguments), *basics]) == 0
        return seen[0]

    return run


def test_config_files_merge_in_order_and_options_win(trained_with, tmp_path):
    for name, options in (("a", {"lr": 0.5, "epochs": 5, "batch_size": 3}), ("b", {"lr": 0.25, "epochs": 7})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"optim": options}))
    config = trained_with("--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--optim.epochs", "9")
    assert (config.optim.batch_size, config.optim.lr, config.optim.epochs) == (3, 0.25, 9)


@pytest.mark.parametrize("form", [["--config", "clip_phi3_stage3"], ["--config=clip_phi3_stage3"]])
def test_presets_by_name(trained_with, form):
    assert trained_with(*form).model.stage == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"\n  libmoe-fast {command}" in capsys.readouterr().out


def test_help_and_no_command_list_the_commands(capsys):
    assert main([]) == 2
    listing = capsys.readouterr().out
    assert all(f"\n    {command} " in listing for command in COMMANDS)


def test_help_imports_nothing_heavy():
    heavy = ("transformers", "deepspeed", "lmms_eval", "matplotlib", "datasets")
    code = (
        "import sys; from libmoe_fast.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        f"sys.exit([m for m in {heavy} if m in sys.modules] or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "--optim.lr" in done.stdout


def shown_commands():
    """Every libmoe-fast line of the README and of the help texts, continued lines joined."""
    from libmoe_fast import cli

    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)
    texts = [*blocks, *(value for name, value in vars(cli).items() if re.fullmatch("_[A-Z]+", name))]
    lines = "\n".join(map(str, texts)).replace("\\\n", " ").splitlines()
    shown = [line.split("#")[0].strip() for line in lines if line.strip().startswith("libmoe-fast ")]
    return sorted({" ".join(line.split()) for line in shown} | set(re.findall(r"`(libmoe-fast \w+ [^`]+)`", readme)))


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_that_is_shown_can_be_parsed(line, monkeypatch, tmp_path):
    from libmoe_fast import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("{}")
    seen = []
    for name in COMMANDS:
        monkeypatch.setattr(cli, f"_{name}", lambda options, name=name: seen.append(name) or 0)
    arguments = shlex.split(line.removesuffix(" ..."))[1:]
    assert main(arguments) == 0
    assert seen == [arguments[0]]
