"""Metrics against closed forms and numbers worked out by hand; the report against logs written here."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from libmoe_fast import ConfigError, DataError, MoE, RouterSpec, Routing, moe_layers, save_model, upcycle
from libmoe_fast.analysis import RoutingCounts, layer_entropy, load_imbalance, total_entropy
from libmoe_fast.analysis.ablation import drop_top1, without_first
from libmoe_fast.analysis.choices import changed, coactivation, left, pack, read_choices, unpack
from libmoe_fast.analysis.counter import count_per_image, counting, distribution, gates_per_image, output_similarity
from libmoe_fast.analysis.counts import GATES
from libmoe_fast.analysis.figures import short_layer_name, training_curves
from libmoe_fast.analysis.report import MISSING, differences_table, make_report, seeds_table
from libmoe_fast.analysis.results import checkpoints_of
from libmoe_fast.analysis.routing_figures import confidence, encoders, layer_choices, subtask_entropy
from libmoe_fast.analysis.runs import Run, find_runs
from libmoe_fast.analysis.significance import paired_bootstrap, question_scores
from libmoe_fast.analysis.weights import weight_distances
from libmoe_fast.train.tiny import tiny_llava


@pytest.mark.parametrize("experts", [1, 2, 4, 6, 64])
def test_even_use_has_entropy_log2_n_and_imbalance_1(experts):
    assert layer_entropy([7] * experts) == pytest.approx(math.log2(experts))
    assert load_imbalance([[7] * experts]) == pytest.approx(1)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_one_expert_has_entropy_0_and_imbalance_n(experts):
    counts = [0] * (experts - 1) + [9]
    entropy = layer_entropy(counts)
    assert entropy == 0
    assert math.copysign(1, entropy) == 1  # a report of "-0.0" would puzzle
    assert load_imbalance([counts]) == experts


def test_entropy_worked_out_by_hand():
    """Eq. 4 for shares 1/2, 1/4, 1/8, 1/8: 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 = 1.75 bits. Eq. 5, with an even layer."""
    assert layer_entropy([8, 4, 2, 2]) == 1.75
    assert total_entropy([[8, 4, 2, 2], [5, 5, 5, 5]]) == 1.875
    assert load_imbalance([[8, 4, 2, 2], [5, 5, 5, 5]]) == 1.5  # (4 * 1/2 + 1) / 2


def test_entropy_only_depends_on_shares():
    """Eq. 4 normalises: ten times the images give the same value, in any order of experts."""
    assert layer_entropy([30, 10, 20]) == pytest.approx(layer_entropy(np.array([200, 300, 100])))


@pytest.mark.parametrize("metric", [layer_entropy, lambda c: total_entropy([c]), lambda c: load_imbalance([c])])
def test_nothing_counted_has_no_entropy(metric):
    with pytest.raises(ValueError, match="above 0"):
        metric([0, 0])


def counts_of(*images):
    """A record of two layers (N = 2 and 3) from (task, category, layer 1, layer 2) per image."""
    counts = RoutingCounts(["a", "b"])
    for task, category, first, second in images:
        counts.add(task, {"category": category}, [np.array(first), np.array(second)])
    return counts


IMAGES = [("mme", "OCR", [1, 2], [1, 1, 1]), ("mme", "code", [3, 0], [0, 0, 3]), ("pope", "adv", [0, 5], [5, 0, 0])]


def test_counts_add_up_by_task_and_category():
    counts = counts_of(*IMAGES)
    mme = counts.tasks["mme"]
    assert mme.total.images == 2
    assert [c.tolist() for c in mme.total.counts] == [[4, 2], [1, 1, 4]]
    assert [c.tolist() for c in mme.categories["category"]["OCR"].counts] == [[1, 2], [1, 1, 1]]
    assert [c.tolist() for c in counts.over_tasks()] == [[4, 7], [6, 1, 4]]
    assert [c.tolist() for c in counts.over_tasks(["pope"])] == [[0, 5], [5, 0, 0]]


def test_merged_ranks_equal_one_rank(tmp_path):
    whole, first, second = counts_of(*IMAGES), counts_of(IMAGES[0], IMAGES[2]), counts_of(IMAGES[1])
    first.merge(second)
    for name, counts in (("whole", whole), ("merged", first)):
        counts.save(tmp_path / name)
    assert json.loads((tmp_path / "whole").read_text()) == json.loads((tmp_path / "merged").read_text())


def test_counts_survive_saving(tmp_path):
    counts_of(*IMAGES).save(tmp_path / "a.json")
    RoutingCounts.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 9}', '{"format": 1, "layers": [], "tasks": {"x": {}}}'])
def test_foreign_records_are_refused_by_name(tmp_path, content):
    path = tmp_path / "routing.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"routing\.json"):
        RoutingCounts.load(path)


def routing(index, num_experts):
    index = torch.tensor(index)
    return Routing(index, index, torch.zeros(*index.shape[:-1], num_experts), index)


def test_counting_per_image():
    """Two images of two tokens, K = 2, N = 4; then each twice in a row: as tiles both count, as beams one does."""
    first, second = [[0, 1], [1, 3]], [[2, 3], [3, 1]]
    once = [[1, 2, 0, 1], [0, 1, 1, 2]]
    assert count_per_image([routing([first, second], 4)], 2).tolist() == once
    assert count_per_image([routing([first, second], 4)], 2, beams=2).tolist() == once  # transformers 5 shows it once
    repeated = [routing([first, first, second, second], 4)]
    assert count_per_image(repeated, 2, beams=2).tolist() == once
    assert count_per_image(repeated, 2).tolist() == [[2 * n for n in row] for row in once]


def test_gates_per_image():
    """Two images of two tokens, N = 2: probabilities, tokens, entropies in bits and margins, summed by hand."""
    probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[1.0, 0.0], [0.9, 0.1]]], dtype=torch.float64)
    weights = torch.tensor([[[0.5, 0.5], [0.75, 0.25]], [[1.0, 0.0], [0.9, 0.1]]], dtype=torch.float64)
    seen = [Routing(torch.zeros(2, 2, 2, dtype=torch.int64), weights, probs)]
    spec = RouterSpec(num_experts=2, top_k=2)
    quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)  # the entropy of (1/4, 3/4)
    tenth = 0.1 * math.log2(10) + 0.9 * math.log2(10 / 9)
    expected = [[0.75, 1.25, 2, 1 + quarter, 0 + 0.5, 0, 0], [1.9, 0.1, 2, 0 + tenth, 1 + 0.8, 0, 0]]
    torch.testing.assert_close(gates_per_image(seen, 2, spec), torch.tensor(expected, dtype=torch.float64))
    alone = [Routing(seen[0].index[..., :1], weights[..., :1], probs)]  # K = 1: the margin is the weight itself
    margins = gates_per_image(alone, 2, RouterSpec(num_experts=2, top_k=1))[:, GATES.index("margin") - len(GATES)]
    assert margins.tolist() == pytest.approx([1.25, 1.9])
    alike = [torch.tensor([0.5, math.nan, -1.0, 0.25])]  # of the four tokens; one had nothing to compare
    compared = gates_per_image(seen, 2, spec, similarity=alike)
    assert compared[:, -2:].tolist() == [[1, 0.5], [2, -0.75]]


@pytest.mark.parametrize(
    ("probability", "given", "expected"),
    [
        ("softmax", [0.2, 0.8], [0.2, 0.8]),
        ("softmax_sigmoid", [0.2, 0.8], [0.2, 0.8]),
        ("sigmoid", [0.3, 0.9], [0.25, 0.75]),  # over their sum
        ("identity", [0.0, math.log(3)], [0.25, 0.75]),  # hyper's scores: their softmax
    ],
)
def test_what_a_router_is_confident_of_is_a_distribution(probability, given, expected):
    spec = RouterSpec(num_experts=2, top_k=1, probability=probability, gate="none")
    assert distribution(torch.tensor(given), spec).tolist() == pytest.approx(expected)


def test_counting_needs_one_pass():
    with pytest.raises(RuntimeError, match="2 times"):
        count_per_image([routing([[[0]]], 2)] * 2, 1)


def write_run(folder, *, router=None, steps=(), results=None, counts=None):
    """A run as train and evaluate leave it: log.jsonl, final/libmoe_fast.json, eval/."""
    (folder / "final").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if router is not None:
        recipe = {"layers": {"a": {"router": router}, "b": {"router": router}}}
        (folder / "final" / "libmoe_fast.json").write_text(json.dumps(recipe))
    if results is not None:
        (folder / "eval").mkdir()
        content = {"format": 1, "checkpoint": {"path": str(folder / "final")}, "scores": results}
        (folder / "eval" / "results.json").write_text(json.dumps(content))
    if counts is not None:
        counts.save(folder / "eval" / "routing.json")


def step(number, seconds, **more):
    return {"step": number, "step_seconds": seconds, "loss": 1 / number, **more}


def cells(table):
    """The rows of a Markdown table as {run: {header: cell}}."""
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_report_shows_what_the_runs_hold_and_invents_nothing(tmp_path):
    """Two routers with everything, a dense run, one that was never evaluated, and one whose folder has no log."""
    share = {"balance_loss": 1.2, "expert_share": {"a": [0.5, 0.5], "b": [0.6, 0.2, 0.2]}}
    write_run(tmp_path / "dense", steps=[step(1, 0.5)], results={"digit": 90.0})
    write_run(
        tmp_path / "smoe",
        router="smoe",
        steps=[step(1, 9.0, **share), step(2, 0.2, **share), step(3, 0.1, **share)],
        results={"digit": 91.25, "parity": 95.0},
        counts=counts_of(("t", "x", [8, 8], [2, 0, 2])),
    )
    write_run(tmp_path / "hyper", router="hyper", steps=[step(1, 0.3, balance_loss=None)])
    write_run(tmp_path / "old", router="cosine", results={"digit": 80.0})
    rows = cells(make_report(tmp_path))
    assert list(rows) == ["dense", "hyper", "old", "smoe"]  # dense first
    assert rows["smoe"] == {
        "run": "smoe",
        "router": "smoe",
        "digit": "91.2",
        "parity": "95.0",
        "load imbalance": "1.250",  # (1 + 3 * 1/2) / 2
        "H_total": "1.0000",  # (1 + 1) / 2
        "step (ms)": "200.0",  # the median: the first step's warm-up does not count
    }
    assert rows["dense"] | {"run": "", "router": ""} == {
        "run": "",
        "router": "",
        "digit": "90.0",
        "parity": MISSING,
        "load imbalance": "-",
        "H_total": "-",
        "step (ms)": "500.0",
    }
    assert [rows["hyper"][c] for c in ("digit", "H_total", "load imbalance", "step (ms)")] == [MISSING] * 3 + ["300.0"]
    assert (rows["old"]["digit"], rows["old"]["step (ms)"]) == ("80.0", MISSING)

    details = {run["run"]: run for run in json.loads((tmp_path / "report.json").read_text())}
    assert details["smoe"]["entropy"]["layers"] == {"a": 1.0, "b": 1.0}
    assert details["smoe"]["entropy"]["tasks"]["t"]["categories"] == {"category": {"x": 1.0}}
    assert details["hyper"]["H_total"] is None
    markdown = (tmp_path / "report.md").read_text()
    for name in ("training.png", "experts.png"):
        assert f"({name})" in markdown
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_without_logs_or_counts_draws_no_empty_figure(tmp_path):
    write_run(tmp_path / "dense", results={"MME": 1500.0})
    make_report(tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert "png" not in (tmp_path / "report.md").read_text()


def test_the_table_is_the_papers(tmp_path):
    """Its order, an average without MME for who has all, the best of the MoE runs in bold; at any depth."""
    scores = {"MME": 1700.0, "POPE": 86.0, "digit": 5.0, "AI2D": 64.0}
    write_run(tmp_path / "a" / "b" / "c" / "d" / "e" / "one", router="smoe", results=scores)
    write_run(tmp_path / "two", router="hyper", results={**scores, "AI2D": 66.0, "MME": 1600.0})
    write_run(tmp_path / "three", router="cosine", results={"POPE": 90.0})
    write_run(tmp_path / "dense", results={**scores, "POPE": 99.0})
    make_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    rows = cells("\n".join(line for line in markdown.splitlines() if line.startswith("|")))
    one, two, three = rows["a/b/c/d/e/one"], rows["two"], rows["three"]
    assert list(one)[2:7] == ["AI2D", "POPE", "MME", "digit", "average"]
    assert [one["average"], two["average"], three["average"]] == ["75.00", "**76.00**", MISSING]
    assert [one["MME"], two["MME"], three["POPE"], rows["dense"]["POPE"]] == [
        "**1700.0**",
        "1600.0",
        "**90.0**",
        "99.0",
    ]
    assert [one["digit"], two["digit"]] == ["**5.0**", "**5.0**"]
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["AI2D"] for row in rows if row["run"] == "two"] == ["66.0"]
    assert [row["AI2D"] for row in rows if row["run"] == "three"] == [""]
    latex = (tmp_path / "report.tex").read_text()
    assert r"\textbf{90.0}" in latex
    assert "report.html" not in latex
    page = (tmp_path / "report.html").read_text()
    assert "<b>76.00</b>" in page
    assert "http" not in page.replace("arXiv", "")
    files = {run["run"]: run["files"] for run in json.loads((tmp_path / "report.json").read_text())}
    assert all(Path(name).is_file() for names in files.values() for name in names)
    assert any(name.endswith("one/eval/results.json") for name in files["a/b/c/d/e/one"])


@pytest.mark.parametrize("number", [2, 9, 26])  # one panel; a second for one run; four
def test_many_runs_have_colours_of_their_own(number, tmp_path, monkeypatch):
    """Legends name every run once, and no colour twice in a panel."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    runs = []
    for i in range(number):
        name = f"run{i}"
        counts = RoutingCounts(["model.vision_tower.encoder.layers.0.mlp", "model.multi_modal_projector"])
        for category in ("OCR", "color"):
            gates = [np.array([1.0, 1.0, 2.0, 1.9, 0.3, 0.0, 0.0])] * 2
            counts.add("mme", {"category": category}, [np.array([1 + i, 3]), np.array([2, 2])], gates)
        steps = [step(s, 0.1, balance_loss=1.0, expert_share={"a": [0.5, 0.5]}) for s in (1, 2)]
        encoder = "CLIP" if i % 2 else "SigLIP"
        runs.append(Run(name, tmp_path, ("smoe", "hyper")[i // 2 % 2], encoder, steps, {}, counts))
    assert training_curves(runs, tmp_path / "x.png")
    assert subtask_entropy(runs, tmp_path / "x.png")
    assert confidence(runs, tmp_path / "x.png")
    assert encoders(runs, tmp_path / "x.png")
    assert layer_choices(runs[0], tmp_path / "x.png")
    for figure in drawn[:3]:
        named = []
        for axis in figure.axes:
            handles, texts = axis.get_legend_handles_labels()
            colours = [handle.get_color() for handle in handles]
            assert len(set(colours)) == len(colours) <= 8
            named += texts
        assert len(set(named)) == number
    seen = {}  # a run is of one colour in all of a figure
    for axis in drawn[0].axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            assert seen.setdefault(text, handle.get_color()) == handle.get_color()
    for figure in drawn[:3]:
        width, height = figure.get_size_inches()
        assert height / len(figure.axes) > 1.5
        assert width > 5


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7, 64, 256])
def test_choices_are_packed_into_the_bits_they_need(experts):
    generator = np.random.default_rng(0)
    layers = [generator.integers(0, experts, (17, 2)), generator.integers(0, experts, (16, 3)), np.zeros((0, 2))]
    packed = json.loads(json.dumps(pack(layers, [experts] * 3)))
    for mine, yours in zip(layers, unpack(packed), strict=True):
        assert np.array_equal(mine, yours)
    bits = (17 * 2 + 16 * 3) * max(math.ceil(math.log2(experts)), 1)
    assert len(packed["bits"]) == 4 * math.ceil(math.ceil(bits / 8) / 3)
    with pytest.raises(ValueError, match="257 experts"):
        pack(layers, [257] * 3)


def test_changes_by_hand():
    """Two documents of three tokens: one token keeps both experts, one swaps them, one loses its second."""
    before = {("t", 0): [np.array([[0, 1], [0, 1], [0, 1]])], ("t", 1): [np.array([[2, 3]])], ("u", 0): []}
    after = {("t", 0): [np.array([[0, 1], [1, 0], [0, 2]])], ("t", 1): [np.array([[2, 3]])], ("t", 2): []}
    assert changed(before, after, "t").tolist() == pytest.approx([(0 + 1 + 0.5 + 0) / 4])  # slots
    assert left(before, after, "t").tolist() == pytest.approx([(0 + 0 + 0.5 + 0) / 4])  # sets: a swap is no change
    assert changed(before, after, "u") is None


def test_scores_over_training(tmp_path):
    """Exports belong to their run: a figure, and when stopping would have been best."""
    steps = [step(i, 0.1, total_steps=20) for i in range(1, 21)]
    write_run(tmp_path / "run", router="smoe", steps=steps, results={"POPE": 80.0, "MME": 1500.0})
    for at, pope in ((2, 70.0), (10, 85.5)):
        folder = tmp_path / "run" / "exports" / f"step-{at}" / "eval"
        folder.mkdir(parents=True)
        content = {"format": 1, "checkpoint": {"path": str(folder.parent)}, "scores": {"POPE": pope}}
        (folder / "results.json").write_text(json.dumps(content))
    (run,) = find_runs(tmp_path)
    assert run.over_training("POPE") == [(0.1, 70.0), (0.5, 85.5), (1.0, 80.0)]
    assert run.over_training("MME") == []
    make_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    row = next(line for line in markdown.splitlines() if line.startswith("| run ") and "50%" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["run", "POPE", "50%", "85.50", "+5.50"]
    assert (tmp_path / "progress.png").exists()
    assert checkpoints_of(tmp_path / "run" / "final") == [tmp_path / "run" / "final"]
    (tmp_path / "run" / "config.yaml").touch()  # what tells a run's folder
    assert checkpoints_of(tmp_path / "run")[:2] == [tmp_path / "run" / "exports" / f"step-{at}" for at in (2, 10)]


def test_report_of_a_single_run(tmp_path):
    write_run(tmp_path / "mine", router="sigmoid", steps=[step(1, 0.1)], results={"MME": 1500.0})
    assert cells(make_report(tmp_path / "mine"))["mine"]["MME"] == "1500.0"


def test_a_killed_runs_log_counts_each_step_once(tmp_path):
    """Half of the last line is missing, and step 2 was done again after the interruption."""
    write_run(tmp_path / "run", steps=[step(1, 0.1), step(2, 5.0), step(2, 0.3)])
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "step_sec')
    (run,) = find_runs(tmp_path)
    assert [line["step"] for line in run.log] == [1, 2]
    assert run.step_milliseconds == pytest.approx(200)


@pytest.mark.parametrize("kind", ["absent", "empty", "foreign"])
def test_a_folder_without_runs_is_refused(tmp_path, kind):
    folder = tmp_path / "runs"
    if kind != "absent":
        folder.mkdir()
    if kind == "foreign":
        (folder / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(ConfigError, match="runs"):
        make_report(folder)


def test_no_log_no_curve(tmp_path):
    assert not training_curves([], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.vision_tower.encoder.layers.3.mlp", "vision 3"),  # transformers 5
        ("model.vision_tower.vision_model.encoder.layers.11.mlp", "vision 11"),  # transformers 4
        ("model.multi_modal_projector", "projector"),
        ("model.mm_projector", "projector"),  # the original LLaVA
        ("blocks.moe", "blocks.moe"),
    ],
)
def test_layer_names_fit_an_axis(name, short):
    assert short_layer_name(name) == short


# ---------------------------------------------------------------------------------------------------------------------
# Differences and noise


def scored_run(folder, name, answers, *, seed=0, router="smoe", score=None):
    """A run with one benchmark of right and wrong answers, as evaluate leaves it."""
    home = folder / name
    (home / "eval" / "samples").mkdir(parents=True)
    (home / "final").mkdir()
    (home / "final" / "libmoe_fast.json").write_text(json.dumps({"layers": {"l": {"router": router}}}))
    (home / "log.jsonl").write_text("")
    settings = {"run": {"seed": seed, "folder": name}, "model": {"router": router}, "optim": {"lr": 0.1}}
    (home / "config.yaml").write_text(json.dumps(settings))
    lines = [json.dumps({"doc_id": i, "accuracy": float(a)}) for i, a in enumerate(answers)]
    (home / "eval" / "samples" / "digits_digit.jsonl").write_text("\n".join(lines) + "\n")
    score = 100 * sum(answers) / len(answers) if score is None else score
    content = {"format": 1, "checkpoint": {"path": str(home / "final")}, "scores": {"digit": score}}
    (home / "eval" / "results.json").write_text(json.dumps(content))
    return home


def test_bootstrap_against_the_normal_interval():
    """Of n independent differences with standard deviation s: +- 1.96 s / sqrt(n), for n = 400 within a tenth."""
    random = np.random.default_rng(1)
    first = {str(i): float(v) for i, v in enumerate(random.random(400) < 0.7)}
    second = {str(i): float(v) for i, v in enumerate(random.random(400) < 0.6)}
    difference, low, high = paired_bootstrap(first, second)
    d = np.array([first[q] - second[q] for q in first])
    half = 1.96 * d.std() / math.sqrt(400)
    assert difference == pytest.approx(d.mean())
    assert low == pytest.approx(difference - half, abs=0.1 * half)
    assert high == pytest.approx(difference + half, abs=0.1 * half)
    assert paired_bootstrap(first, second) == (difference, low, high)
    same = paired_bootstrap(first, first)
    assert same == (0, 0, 0)


def test_bootstrap_needs_the_same_questions():
    for second in ({"a": 1.0}, {"a": 1.0, "c": 1.0}, {}):
        with pytest.raises(ValueError, match="same questions"):
            paired_bootstrap({"a": 1.0, "b": 0.0} if second else {}, second)


def test_differences_inside_noise_and_beyond(tmp_path):
    right = [True] * 180 + [False] * 20
    scored_run(tmp_path, "best", right)
    scored_run(tmp_path, "close", [*right[1:], False], router="cosine")
    scored_run(tmp_path, "far", [True] * 100 + [False] * 100, router="hyper")
    scored_run(tmp_path, "other questions", right[:150], router="sigmoid")
    _, rows, _ = differences_table(find_runs(tmp_path))
    found = {row[1]: row for row in rows}
    assert found.keys() == {"best - close", "best - far"}
    assert found["best - close"][2:] == ["0.50", found["best - close"][3], "inside noise"]
    assert found["best - far"][2] == "40.00"
    assert found["best - far"][4] == "beyond it"
    make_report(tmp_path)
    assert "paired" in (tmp_path / "report.md").read_text()
    assert "| digit" in (tmp_path / "report.md").read_text()


def test_a_score_that_is_no_mean_of_answers_is_not_compared(tmp_path):
    scored_run(tmp_path, "points", [True, False], score=1600.0)
    (run,) = find_runs(tmp_path)
    assert question_scores(run, "digit") is None


def test_seeds_as_mean_and_spread(tmp_path):
    for seed, right in enumerate((8, 9, 10)):
        scored_run(tmp_path, f"smoe-{seed}", [True] * right + [False] * (10 - right), seed=seed)
    scored_run(tmp_path, "cosine", [True] * 10, router="cosine")
    headers, rows, _ = seeds_table(find_runs(tmp_path))
    assert headers == ["router", "runs", "digit"]
    assert rows == [["smoe", "smoe-0, smoe-1, smoe-2", "90.0 ± 10.0"]]


# ---------------------------------------------------------------------------------------------------------------------
# Without each token's first expert


def test_the_others_take_over_the_first_experts_weight():
    index, weights = torch.tensor([[2, 0, 1], [1, 2, 0]]), torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    left = without_first(Routing(index, weights))
    assert torch.equal(left.index, index[:, 1:])
    torch.testing.assert_close(left.weights, torch.tensor([[0.6, 0.4], [0.0, 0.0]]))  # nothing stays nothing


@pytest.mark.parametrize("router", ["smoe", "hyper", "shared_v2"])
def test_a_layer_without_first_experts(router):
    """Against the same experts, called one by one; a shared expert stays."""
    torch.manual_seed(0)
    moe, x = MoE(6, 8, 6, num_experts=4, top_k=3, router=router).double().eval(), torch.randn(5, 6, dtype=torch.float64)
    routing = moe.router(x)
    drop_top1(moe)
    expected = torch.zeros_like(x)
    for t in range(5):
        left = routing.weights[t, 1:] / routing.weights[t, 1:].sum()
        for w, e in zip(left, routing.index[t, 1:], strict=True):
            hidden = F.gelu(moe.experts.w1[e] @ x[t] + moe.experts.bias1[e])
            expected[t] += w * (moe.experts.w2[e] @ hidden + moe.experts.bias2[e])
    torch.testing.assert_close(moe(x), expected)


def test_models_without_a_second_expert_are_refused():
    with pytest.raises(ConfigError, match="dense: it has no first experts"):
        drop_top1(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="to one expert: without it"):
        drop_top1(MoE(6, 8, 6, num_experts=4, top_k=1, router="sigmoid", router_options={"normalize": "none"}))


# ---------------------------------------------------------------------------------------------------------------------
# Experts chosen together


def test_coactivation_by_hand():
    """Three tokens choose {0, 1}, {0, 2}, {0, 1} of 4 experts."""
    choices = {("a", 0): [np.array([[0, 1], [2, 0]])], ("a", 1): [np.array([[1, 0]])], ("b", 0): [np.array([[3, 2]])]}
    (found,) = coactivation(choices, "a", [4])
    nan = np.nan
    expected = [[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [nan, nan, nan, nan]]
    np.testing.assert_allclose(found, expected)


def test_coactivation_of_even_choices():
    """All pairs of 5 experts once: (K - 1) / (N - 1) = 1 / 4."""
    pairs = np.array([[i, j] for i in range(5) for j in range(i)])
    (found,) = coactivation({("a", 0): [pairs]}, "a", [5])
    np.testing.assert_allclose(found, np.where(np.eye(5), 1, 0.25))


def test_choices_of_an_older_checkpoint_are_not_read(tmp_path):
    (tmp_path / "answers").mkdir()
    packed = [pack([np.array([[0, 1]])], [2]), pack([np.array([[1, 0]])], [2])]
    lines = [
        {"run": run, "task": "a", "document": document, "choices": choices}
        for run, document, choices in (("new", 0, packed[0]), ("old", 0, packed[1]), ("old", 1, packed[1]))
    ]
    (tmp_path / "answers" / "a.0.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    content = {"format": 1, "checkpoint": {"path": "x"}, "scores": {}, "answers": "new"}
    (tmp_path / "results.json").write_text(json.dumps(content))
    found = read_choices(tmp_path)
    assert found.keys() == {("a", 0)}
    assert found["a", 0][0].tolist() == [[0, 1]]


# ---- outputs and weights


def test_output_similarity_by_hand():
    """Three experts without biases that turn their input by 0, 90 and 180 degrees; the last token has one of them."""
    moe = MoE(2, 2, 2, num_experts=3, top_k=2, activation="relu", bias=False)
    turns = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    moe.experts.w1.data = torch.eye(2).expand(3, 2, 2).clone()
    moe.experts.w2.data = turns
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])  # relu leaves nothing of the last one
    index = torch.tensor([[0, 1], [0, 2], [1, 1], [0, 1]])
    found = output_similarity(moe, x, Routing(index, torch.full((4, 2), 0.5)))
    torch.testing.assert_close(found, torch.tensor([0.0, -1.0, 1.0, math.nan]), equal_nan=True)


def test_output_similarity_of_many_is_the_mean_over_pairs():
    torch.manual_seed(0)
    moe, x = MoE(6, 8, 6, num_experts=5, top_k=4), torch.randn(7, 6)
    routing = moe.router(x)
    for t, value in enumerate(output_similarity(moe, x, routing)):
        outputs = [
            F.linear(F.gelu(F.linear(x[t], moe.experts.w1[e], moe.experts.bias1[e])), moe.experts.w2[e])
            + moe.experts.bias2[e]
            for e in routing.index[t]
        ]
        pairs = [F.cosine_similarity(a, b, dim=0) for i, a in enumerate(outputs) for b in outputs[i + 1 :]]
        torch.testing.assert_close(value, torch.stack(pairs).mean())


def test_any_model_is_counted():
    """A stock classifier, its third layer swapped: three batches, of them all tokens; experts agree as copies do."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    upcycle(model, targets=["*.2.mlp"], num_experts=4, top_k=2)
    counts = RoutingCounts(list(moe_layers(model)))
    assert len(counts.layers) == 1
    for subject in ("cats", "dogs", "cats"):
        with counting(model, counts, "pets", {"subject": subject}, outputs=True), torch.no_grad():
            model(torch.randn(2, 3, 8, 8))
    tally = counts.tasks["pets"].total
    assert tally.images == 3
    assert tally.counts[0].sum() == 3 * 2 * 5 * 2  # batches, images, 4 patches and the class, K
    assert tally.mean("similarity") == pytest.approx([1.0])
    assert 0 < tally.mean("entropy")[0] < 2
    assert {value: t.images for value, t in counts.tasks["pets"].categories["subject"].items()} == {
        "cats": 2,
        "dogs": 1,
    }


def test_weight_distances_by_hand(tmp_path):
    """Copies have not moved; then one expert of one layer is scaled, in both of its matrices."""
    model, processor = tiny_llava("clip", vision_layers=2, text_layers=1)
    save_model(model, tmp_path / "dense", processor=processor)
    upcycle(model, num_experts=3, targets=["vision", "projector", "language"])  # gated ones among them
    for found in weight_distances(model, tmp_path / "dense").values():
        assert found["since_upcycling"] == [0.0] * 3
        assert found["between"] == [[0.0] * 3] * 3
    name, layer = next(iter(moe_layers(model).items()))
    layer.experts.w1.data[1] *= 1.5
    layer.experts.w2.data[1] *= 1.5
    layer.experts.bias1.data.add_(9)  # biases are not looked at
    moved = weight_distances(model, tmp_path / "dense")[name]
    assert moved["since_upcycling"] == pytest.approx([0, 0.5, 0])
    assert np.array(moved["between"]) == pytest.approx(np.array([[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]]))
    alone = weight_distances(model)[name]  # |W| is not known: over the root mean square of 1, 1.5 and 1
    assert alone.keys() == {"between"}
    assert alone["between"][0][1] == pytest.approx(0.5 / math.sqrt((1 + 2.25 + 1) / 3))
    assert weight_distances(torch.nn.Linear(2, 2)) == {}
