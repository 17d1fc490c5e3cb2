"""The held-out loss against plain PyTorch, and stopping by it. On two processes: test_processes.py."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import computed, make_config, write_data

from libmoe_fast import load_model
from libmoe_fast.analysis.report import best_table
from libmoe_fast.analysis.runs import find_runs
from libmoe_fast.errors import ConfigError, DataError
from libmoe_fast.train import held_out
from libmoe_fast.train.config import check_values
from libmoe_fast.train.data import ConversationDataset, make_collator
from libmoe_fast.train.held_out import HeldOut, held_out_data, read_held_out
from libmoe_fast.train.loop import train
from libmoe_fast.train.model import build_model, image_tokens


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("other"), images=5, texts=4)


def test_it_is_the_mean_over_all_answers_tokens(tmp_path, model, images, other):
    """Of what was exported, and of final/; measuring changes nothing in training."""
    options = {"optim__batch_size": 4, "optim__accumulation": 2}
    config = make_config(
        tmp_path / "run", model, images, **options, data__held_out=str(other), run__export_at=[0.4, 1.0]
    )
    train(config)
    train(make_config(tmp_path / "without", model, images, **options))
    assert computed(tmp_path / "run") == computed(tmp_path / "without")

    measured = read_held_out(tmp_path / "run")
    assert [line["step"] for line in measured] == [1, 3]
    _, processor = build_model(config.model, dtype=torch.float32)
    for line, place in zip(measured, ("exports/step-1", "final"), strict=True):
        trained = load_model(tmp_path / "run" / place).eval()
        tokens = image_tokens(trained)
        dataset = ConversationDataset(held_out_data(config), processor, image_tokens=tokens, template="phi3")
        assert len(dataset) == 9
        collate, losses = make_collator(processor, tokens), []
        for i in range(len(dataset)):
            inputs = collate([dataset[i]]).inputs
            with torch.no_grad():
                logits = trained(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            labels = inputs["labels"][:, 1:]
            each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
            losses.append(each[labels != -100])
        assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    (run,) = find_runs(tmp_path / "run")
    _, rows, _ = best_table([run])
    best = min(measured, key=lambda line: line["loss"])
    gain = f"{best['loss'] - measured[-1]['loss']:+.4f}"
    assert rows == [["run", "held-out loss", f"{100 * best['step'] / 3:.0f}%", f"{best['loss']:.4f}", gain]]


def test_a_run_stops_when_it_has_not_fallen(tmp_path, model, images, other, capsys):
    """A rate that ruins the model: after the first look nothing is better. The same command says that it is done."""
    config = make_config(
        tmp_path / "run",
        model,
        images,
        data__held_out=str(other),
        run__export_at=[0.1 * tenth for tenth in range(1, 10)],
        run__patience=2,
        optim__max_steps=10,
        optim__lr=0.3,
    )
    train(config)
    measured = read_held_out(tmp_path / "run")
    losses = [line["loss"] for line in measured]
    assert 3 <= len(losses) < 10
    assert min(losses) == losses[-3]  # two looks since, both no better
    assert [line["step"] for line in computed(tmp_path / "run")] == [line["step"] for line in measured]
    said = capsys.readouterr().out
    assert f"stopped after step {len(losses)} of 10, as run.patience says" in said
    assert f"the lowest is {losses[-3]:.4f} after step {measured[-3]['step']}" in said
    final = load_model(tmp_path / "run" / "final").state_dict()
    last = load_model(tmp_path / "run" / "exports" / f"step-{len(losses)}").state_dict()
    assert all(torch.equal(final[name], last[name]) for name in last)
    train(config)
    assert "is done already" in capsys.readouterr().out


def test_what_a_killed_run_measured_later_is_forgotten(tmp_path):
    file = tmp_path / held_out.HELD_OUT
    file.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (10, 20, 30)))
    assert [line["step"] for line in read_held_out(tmp_path)] == [10, 20, 30]
    assert read_held_out(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 3.0], 1, True),  # equal is not lower
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, float("nan"), float("nan")], 2, True),
        ([1.0, 2.0, 3.0], None, False),
    ],
)
def test_patience(losses, patience, stops):
    found = HeldOut.__new__(HeldOut)
    found.patience, found.measured = patience, [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    assert found.exhausted == stops


def test_what_cannot_work_is_refused(tmp_path, model, images):
    for options in ({"run__export_at": [0.5]}, {"data__held_out": "other.json"}):
        with pytest.raises(ConfigError, match=r"run\.patience needs data\.held_out"):
            check_values(make_config(tmp_path / "run", model, images, run__patience=2, **options))
    with pytest.raises(DataError, match=r"other\.json"):
        train(make_config(tmp_path / "run", model, images, data__held_out=str(tmp_path / "other.json")))
