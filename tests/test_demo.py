"""The demo's data and plan. The demo itself runs in CI, as `python -m libmoe_fast.train.demo --short`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from libmoe_fast import ConfigError, LibMoEError
from libmoe_fast.cli import main
from libmoe_fast.evaluate import Outcome
from libmoe_fast.train import demo
from libmoe_fast.train.digits import QUESTIONS, VOCAB_TEXTS, write_digits
from libmoe_fast.train.tiny import tiny_llava


def files(folder):
    """But for byte code, which is there once another test has imported the tasks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def read(path):
    return json.loads(path.read_text())


def test_the_data_is_the_same_every_time(digits, tmp_path):
    again = write_digits(tmp_path / "data", held_out=9, limit=40)
    assert files(digits.images) == files(again.images)
    other = write_digits(tmp_path / "other", held_out=9, limit=40, seed=1)
    assert read(other.test) != read(again.test)


def test_no_held_out_image_is_trained_on(tmp_path):
    """At full size; pixel for pixel as well, for the same scan could hide under two names."""
    paths = write_digits(tmp_path / "data")
    train, test = read(paths.train), read(paths.test)
    held_out = {record["image"] for record in test}
    assert (len(train), len(test), len(held_out)) == (2 * 1497, 2 * 300, 300)
    assert not held_out & {record["image"] for record in train}
    pixels = [(paths.images / record["image"]).read_bytes() for record in test[::2] + train[::2]]
    assert len(set(pixels)) == 1797
    assert len({record["id"] for record in train + test}) == 2 * 1797


def test_answers_and_images_are_scikit_learns(digits):
    source = load_digits()
    records = read(digits.train) + read(digits.test)
    assert {r["conversations"][0]["value"] for r in records} == {f"<image>\n{q}" for q in QUESTIONS.values()}
    for record in records:
        index, task = record["id"].split("-")
        digit = int(source.target[int(index)])
        expected = str(digit) if task == "digit" else ["even", "odd"][digit % 2]
        assert record["conversations"][1] == {"from": "gpt", "value": expected}
        image = Image.open(digits.images / record["image"])
        assert (image.size, image.mode) == ((32, 32), "RGB")
        # Enlarged four times: the mean of each 4 x 4 block is about the scanned pixel (bicubic overshoots at edges).
        blocks = np.asarray(image)[..., 0].reshape(8, 4, 8, 4).mean((1, 3)) * 16 / 255
        assert np.abs(blocks - source.images[int(index)]).mean() < 1


def test_writing_again_changes_nothing(digits):
    before = {path: path.stat().st_mtime_ns for path in digits.images.rglob("*")}
    write_digits(digits.images, held_out=9, limit=40)
    assert {path: path.stat().st_mtime_ns for path in digits.images.rglob("*")} == before


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.write_digits.__globals__["shutil"], "copytree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "data", held_out=2, limit=5)
    assert list(tmp_path.iterdir()) == []


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("held_out", [0, 40, 41])
def test_impossible_splits_are_refused(tmp_path, held_out):
    with pytest.raises(ConfigError, match=f"hold out {held_out} of 40"):
        write_digits(tmp_path / "data", held_out=held_out, limit=40)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not the digits data set"):
        write_digits(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tiny_model_follows_its_seed_alone(kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, processor = tiny_llava(kind, vocab_texts=VOCAB_TEXTS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    same, other = tiny_llava(kind, vocab_texts=VOCAB_TEXTS)[0], tiny_llava(kind, vocab_texts=VOCAB_TEXTS, seed=1)[0]
    weights = [model.lm_head.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    # A text that the tokenizer never saw survives it, and an image takes as many tokens as the model expects.
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer("Zoë, 42%?")["input_ids"]) == "Zoë, 42%?"
    inputs = processor(text="<image>\nWhat?", images=Image.new("RGB", (32, 32)), return_tensors="pt")
    assert (inputs["input_ids"] == first.config.image_token_id).sum() == 16
    with torch.no_grad():
        assert torch.isfinite(first(**inputs).logits).all()


@pytest.mark.parametrize("options", [{"kind": "vit"}, {"image_size": 30}, {"dim": 66}])
def test_impossible_tiny_models_are_refused(options):
    with pytest.raises(ConfigError):
        tiny_llava(**options)


PLANS = [pytest.param(demo.FULL, id="full"), pytest.param(demo.SHORT, id="short")]


@pytest.mark.parametrize("plan", PLANS)
def test_every_part_of_the_plan_can_start_once_others_have_ended(plan, tmp_path, digits):
    """And every encoder, router and seed is trained, and evaluated with and without first experts."""
    todo = demo.parts(tmp_path, digits, plan)
    there = {tmp_path / encoder / "model" for encoder in plan.encoders}
    for part in todo:
        assert set(part.needs) <= there, part.title
        there |= set(part.results)
    for encoder in plan.encoders:
        for router in plan.routers:
            for seed in plan.seeds:
                run = tmp_path / encoder / f"{router}-seed{seed}"
                for result in ("final", "eval/results.json", "eval-without-top1/results.json"):
                    assert run / result in there


def test_every_command_of_the_plan_is_accepted(tmp_path, digits, monkeypatch):
    """Each through the real command line, with its options checked; only the work itself is left out."""
    ran = []
    monkeypatch.setattr("libmoe_fast.train.loop.train", lambda config: ran.append(config.model.stage))
    monkeypatch.setattr("libmoe_fast.evaluate.evaluate", lambda _, config: ran.append(config.tasks) or Outcome({}, {}))
    for plan in (demo.FULL, demo.SHORT):
        for part in demo.parts(tmp_path, digits, plan):
            assert main(list(part.command)) == 0
    runs = [len(plan.encoders) * len(plan.routers) * len(plan.seeds) for plan in (demo.FULL, demo.SHORT)]
    assert runs == [20, 2]
    assert ran.count(3) == sum(runs)
    assert ran.count(["digit", "parity"]) == 2 + 1 + 2 * sum(runs)  # of stage 2; whole, and without first experts


def test_other_routers_can_be_compared(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(demo, "run_parts", lambda todo, *_, **__: ran.extend(todo))
    monkeypatch.setattr("libmoe_fast.analysis.report.make_report", lambda out: "table")
    monkeypatch.setattr(demo, "write_model", lambda *_: None)
    assert demo.main(["--short", "--out", str(tmp_path), "--routers", "xmoe", "moe_plus_plus", "xmoe"]) == 0
    trained = [part.title for part in ran if "seed0" in part.title and part.title.startswith("train")]
    assert trained == ["train clip/xmoe-seed0", "train clip/moe_plus_plus-seed0"]
    assert demo.main(["--short", "--out", str(tmp_path), "--routers", "all"]) == 2
    assert "holds a demo with other settings" in capsys.readouterr().err


def test_a_short_demo_is_never_taken_for_a_full_one(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(demo, "run_parts", lambda todo, *_, **__: ran.extend(todo))
    monkeypatch.setattr("libmoe_fast.analysis.report.make_report", lambda out: "table")
    monkeypatch.setattr(demo, "write_model", lambda *_: None)
    assert demo.main(["--short", "--out", str(tmp_path)]) == 0
    parts_of_a_short_one = len(ran)
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert len(ran) == parts_of_a_short_one
    assert demo.main(["--short", "--out", str(tmp_path)]) == 0  # the same again is welcome


PYTHON = "import sys, time, pathlib\n"


def scripted(title, script, *, needs=(), results=()):
    return demo.Part(title=title, command=(script,), needs=tuple(needs), results=tuple(results))


@pytest.fixture
def scripts(monkeypatch):
    """Parts whose command is a line of Python."""
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", PYTHON + command[-1]], **options)

    monkeypatch.setattr(demo.subprocess, "Popen", start)


def test_finished_parts_are_kept_and_others_wait_for_what_they_need(scripts, tmp_path):
    kept, first, second = (tmp_path / name for name in ("kept", "first", "second"))
    kept.write_text("from before")
    touch = "time.sleep(0.3); pathlib.Path({!r}).write_text(str(pathlib.Path({!r}).exists()))"
    todo = [
        scripted("waits", touch.format(str(second), str(first)), needs=[first], results=[second]),
        scripted("kept", "sys.exit(3)", results=[kept]),
        scripted("starts", touch.format(str(first), str(second)), needs=[kept], results=[first]),
    ]
    demo.run_parts(todo, tmp_path / "logs", jobs=2)
    assert (kept.read_text(), first.read_text(), second.read_text()) == ("from before", "False", "True")


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_parts_run_side_by_side_as_asked_for(jobs, scripts, tmp_path):
    """Each counts the others that are there while it is."""
    script = (
        "me = pathlib.Path({0!r}, '{1}'); me.touch(); time.sleep(1.5); "
        "pathlib.Path({0!r}, '{1}.seen').write_text(str(len(list(me.parent.glob('?'))))); me.unlink()"
    )
    todo = [scripted(n, script.format(str(tmp_path), n), results=[tmp_path / f"{n}.seen"]) for n in "abc"]
    demo.run_parts(todo, tmp_path / "logs", jobs=jobs)
    assert max(int((tmp_path / f"{n}.seen").read_text()) for n in "abc") == jobs


def test_a_failed_part_says_why_and_stops_the_others(scripts, tmp_path):
    ended = tmp_path / "ended"
    other = f"try: time.sleep(60)\nexcept KeyboardInterrupt: pathlib.Path({str(ended)!r}).touch()"
    failing = "time.sleep(2); print('no such folder'); sys.exit(2)"
    todo = [
        scripted("other one", other, results=[tmp_path / "never"]),
        scripted("report it", failing, results=[tmp_path / "none"]),
    ]
    with pytest.raises(LibMoEError, match=r"report it failed with exit code 2\n.*no such folder"):
        demo.run_parts(todo, tmp_path / "logs", jobs=2)
    assert ended.exists()
