"""Benchmarks that can be believed: peers compute what we do, memory and ratios are right, regressions are flagged."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from libmoe_fast import BackendError, ConfigError, Experts, MoE
from libmoe_fast.benchmarks import arena, cases, cpu_ratio, memory, peers, results
from libmoe_fast.benchmarks.compare import compare_files
from libmoe_fast.benchmarks.measure import Contest, Entrant, Spread, run_together
from libmoe_fast.benchmarks.memory import peak_bytes, resident_peak, saved_bytes
from libmoe_fast.benchmarks.report import markdown, write_report
from libmoe_fast.benchmarks.run import measure, races, run_preset
from libmoe_fast.cli import main
from libmoe_fast.routers import COMPARED

CPU = torch.device("cpu")
resident = pytest.mark.skipif(not memory.SELF.exists(), reason="only Linux tells a process its resident memory")
ON_CPU = ("loop", "split", "grouped_mm", "hf_eager", "hf_grouped_mm", "hf_batched_mm", "st_moe")


def shape(**changes):
    return dataclasses.replace(cases.TINY, num_experts=5, **changes)


SHAPES = {
    "biases": shape(),
    "gated, no biases": shape(activation="silu", gated=True, bias=False),
    "no biases": shape(bias=False),  # what megablocks and scattermoe take
    "projector": shape(out_features=12),  # O != D
}


# ---------------------------------------------------------------------------------------------------------------------
# Peers


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_equals_ours(name, sizes):
    """Output, every gradient, and the gradient that reaches the router through the gate weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bf16" if device.type == "cuda" else "fp32"  # GPU peers run in bf16 only
    case = cases.Case(subject="layer", shape=SHAPES[sizes], tokens=33, dtype=dtype)
    if reason := peers.why_not(name, case):
        pytest.skip(reason)
    torch.manual_seed(0)
    ours = arena.make_moe(case, device)
    theirs = peers.add_peer(ours, name)
    x, dy = (arena.random_tokens(case, device, features=n) for n in (16, SHAPES[sizes].out_features))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 3e-2, "atol": 3e-2}
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, **tolerance)
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    torch.testing.assert_close(ours.router.weight.grad, theirs.router.weight.grad, **tolerance)
    gradients = theirs.experts.gradients()
    expected = {n: p.grad for n, p in ours.experts.named_parameters()}
    assert set(gradients) == set(expected)
    for key, value in expected.items():
        assert value.abs().sum() > 0
        torch.testing.assert_close(gradients[key], value, **tolerance)


@pytest.mark.parametrize("name", ON_CPU)
def test_peers_that_run_on_a_cpu_do(name):
    """The parity test would pass by skipping."""
    if name == "st_moe":
        pytest.importorskip("st_moe_pytorch")
    assert peers.PEERS[name].missing() is None


def test_peer_that_is_not_there_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.PEERS["st_moe"].missing() == "not installed; pip install st-moe-pytorch"
    moe = MoE(8, 8, 8, num_experts=2, top_k=1)
    with pytest.raises(BackendError, match=r"megablocks.*pip install"):
        peers.add_peer(moe, "megablocks")


def test_peers_that_would_fill_the_memory_stay_away():
    """batched_mm copies weights per choice; one-hot dispatch grows with the square of T."""
    big = cases.Case(subject="layer", shape=cases.CLIP, tokens=32768)
    assert "GiB" in peers.PEERS["hf_batched_mm"].refuses(big)
    assert "GiB" in peers.PEERS["st_moe"].refuses(big)


def test_peer_leaves_the_layer_as_it_was():
    moe = MoE(8, 8, 8, num_experts=2, top_k=1)
    before = {name: id(p) for name, p in moe.named_parameters()}
    other = peers.add_peer(moe, "loop")
    other(torch.randn(3, 8)).sum().backward()
    assert {name: id(p) for name, p in moe.named_parameters()} == before
    assert all(p.grad is None for p in moe.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def run():
            self.now += seconds

        return run


def test_contest_takes_ratios_to_the_limit_right_before():
    """A limit that slows down from round to round, as on a busy machine, leaves the ratios alone."""
    clock, slow, order = FakeClock(), [1.0], []

    def limit():
        slow[0] *= 2
        order.append("limit")
        clock.now += slow[0]

    def entrant(name, factor):
        def run():
            order.append(name)
            clock.now += factor * slow[0]

        return Entrant(run, lambda: clock.takes(100)())

    contest = Contest({"ours": entrant("ours", 1.5), "peer": entrant("peer", 3)}, limit=limit, clock=clock)
    contest.warm_up()
    contest.run(4)
    assert contest.timings["ours"].over_limit == Spread(1.5, 1.5, 1.5)
    assert contest.timings["peer"].over_limit == Spread(3, 3, 3)
    assert len(contest.timings["ours"].seconds) == 4
    assert order == ["limit", "peer", "limit", "ours"] * 5


def test_contest_times_a_slow_peer_once():
    clock = FakeClock()
    entrants = {name: Entrant(clock.takes(s)) for name, s in {"ours": 5, "slow": 50, "behind": 12, "fast": 1}.items()}
    contest = Contest(entrants, limit=clock.takes(1), clock=clock)
    contest.warm_up(patience=10)
    contest.run(3)
    assert {name: len(t.seconds) for name, t in contest.timings.items()} == {
        "ours": 3,
        "slow": 1,
        "behind": 3,
        "fast": 3,
    }
    assert contest.timings["slow"].over_limit.median == 50


def test_contests_run_together_are_interleaved():
    order = []
    contests = [
        Contest({n: Entrant(lambda n=n: order.append(n))}, limit=lambda: None, clock=FakeClock()) for n in ("a", "b")
    ]
    run_together(contests, 2)
    assert order == ["a", "b"] * 2


def test_a_growth_series_is_one_race():
    groups = list(races(cases.tiny_cases()))
    assert [case for group in groups for case in group] == cases.tiny_cases()
    series = [group for group in groups if group[0].sweep]
    assert [{case.sweep for case in group} for group in series] == [{"T"}, {"N"}, {"K"}, {"H"}]
    assert all(len(group) == 1 for group in groups if group not in series)


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_saved_memory_is_counted_right():
    """1 MiB tensors: one result kept; what the entrant holds anyway does not count."""
    x = torch.ones(2**18, requires_grad=True)

    def run():
        return ((x * 2).exp() * 3).sum()  # exp saves its result; the products save nothing of this size

    entrant = Entrant(run, held=(x,))
    assert saved_bytes(entrant) == 2**20
    assert saved_bytes(Entrant(lambda: x * x, held=(x,))) == 0
    assert saved_bytes(Entrant(lambda: x * x)) == 2**20


@resident
def test_resident_memory_is_counted_right():
    """64 MiB tensors, two alive at a time; what a run keeps for the next one counts, too."""
    x = torch.ones(2**24)
    kept = []

    def temporaries():
        ((x * 2).exp() * 3).sum()

    def keeps():
        kept[:] = [x * 2]

    assert resident_peak(Entrant(temporaries)) == pytest.approx(2 * x.nbytes, rel=0.05)
    assert resident_peak(Entrant(keeps)) == pytest.approx(2 * x.nbytes, rel=0.05)
    assert resident_peak(Entrant(keeps, reset=kept.clear)) == pytest.approx(x.nbytes, rel=0.05)
    assert resident_peak(Entrant(lambda: None)) < 2**20


@resident
def test_peak_memory_is_that_of_an_entrant_alone():
    """Whatever ran before here, and kept memory: a case's gradients and pre-activation alone are more than nothing."""
    sizes = dataclasses.replace(cases.TINY, in_features=512, hidden_features=2048, out_features=512)
    case = cases.Case(subject="layer", shape=sizes, tokens=1024, dtype="fp32", peers=("loop",))
    ours = arena.build_arena(case, CPU).entrants["ours"]
    for _ in range(2):
        ours.run()
        ours.reset()
    peaks = peak_bytes(case, ["ours", "loop"], CPU)
    least = case.experts_bytes() + case.tokens * sizes.top_k * sizes.hidden_features * 4
    for name, peak in peaks.items():
        assert least < peak < 4 * least, name


def test_limit_has_the_flops_of_the_layer():
    """Counted by torch's own flop counter, on the reference backend."""
    from torch.utils.flop_counter import FlopCounterMode

    from libmoe_fast.benchmarks.limits import dense_gemms

    for sizes in (SHAPES["biases"], SHAPES["gated, no biases"]):
        for mode in ("inference", "fwd+bwd"):
            case = cases.Case(subject="layer", shape=sizes, tokens=33, dtype="fp32", mode=mode)
            with FlopCounterMode(display=False) as counter:
                dense_gemms(case, CPU)()
            up = sizes.hidden_features * (2 if sizes.gated else 1)
            rows = 33 * sizes.top_k
            forward = 2 * rows * (sizes.in_features * up + sizes.hidden_features * sizes.out_features)
            assert counter.get_total_flops() == forward * (3 if mode == "fwd+bwd" else 1)


def test_fitted_exponent():
    assert results.slope([1, 2, 4, 8], [3 * v**1.5 for v in (1, 2, 4, 8)]) == pytest.approx(1.5)


# ---------------------------------------------------------------------------------------------------------------------
# Presets


@pytest.mark.parametrize("name", cases.PRESETS)
def test_preset(name):
    """Each case once; all but cpu, which is a table of layers, cover the end-to-end subjects; paper has no growth."""
    preset = cases.find_preset(name)
    ids = [case.id for case in preset.cases]
    assert len(ids) == len(set(ids))
    subjects = {case.subject for case in preset.cases}
    if name == "cpu":
        assert subjects == {"layer"}
        assert len(ids) == 14
        return
    assert {"layer", "encoder", "training"} <= subjects <= set(cases.SUBJECTS)
    if name != "paper":
        assert {case.router for case in preset.cases if case.subject == "routing"} == set(COMPARED)
        assert {case.sweep for case in preset.cases} == {None, "T", "N", "K", "H"}


# ---------------------------------------------------------------------------------------------------------------------
# The CPU table


@pytest.fixture
def cpu_table(monkeypatch, capsys):
    """Runs cpu_ratio.py on small layers; gives the cells of its table by the first column."""
    sizes = dataclasses.replace(cases.TINY, in_features=64, hidden_features=256, out_features=64)
    targets = [cases.Target(sizes, 2048, "bf16", 1.06, 1.10), cases.Target(sizes, 64, "fp32", 1.40, 2.00)]
    monkeypatch.setattr(cpu_ratio, "CPU_TARGETS", targets)
    monkeypatch.setattr(cpu_ratio, "CLIP_L", targets[0])
    monkeypatch.setattr(cpu_ratio, "GROWTH_TOKENS", [16, 64])
    monkeypatch.setenv("LIBMOE_FAST_BACKEND", "cpu")  # it sets this: put back afterwards

    def run(*options):
        cpu_ratio.main(["--rounds", "2", "--threads", "1", *options])
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return {first: cells for first, *cells in lines}

    return run


def ratio(cell: str) -> float:
    """The median of `median [low, high]`."""
    median, low, high = map(float, re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", cell).groups())
    assert 0 < low <= median <= high
    return median


def test_cpu_table(cpu_table):
    table = cpu_table()
    assert list(table) == ["T, D, H, O, N, K", "---", "2048, 64, 256, 64, 4, 2", "64, 64, 256, 64, 4, 2"]
    assert table["T, D, H, O, N, K"][2:] == ["ours", "loop", "grouped_mm"]
    _, target, *cells = table["2048, 64, 256, 64, 4, 2"]
    assert target == "1.06 / 1.10"
    for forward, both in (cell.split(" / ") for cell in cells):
        assert ratio(forward) > 0
        assert ratio(both) > 0
    assert cpu_table("--shape", "64", "--only", "loop")["T, D, H, O, N, K"][2:] == ["loop"]
    with pytest.raises(SystemExit):
        cpu_table("--shape", "64", "--dtype", "bf16")


def test_cpu_routers_dtypes_and_growth(cpu_table):
    table = cpu_table("--routers")
    slowest_over_fastest = table.pop("slowest / fastest (target 1.03)")
    over_mean = [ratio(cells[1]) for name, cells in table.items() if name in COMPARED]  # of forward
    assert len(over_mean) == 5
    assert min(over_mean) <= 1 <= max(over_mean)
    assert float(slowest_over_fastest[1]) == pytest.approx(max(over_mean) / min(over_mean), rel=0.05)
    table = cpu_table("--bf16")  # of the one shape that has it
    assert list(table) == ["T, D, H, O, N, K", "---", "2048, 64, 256, 64, 4, 2"]
    assert all(ratio(cell) > 0 for cell in table["2048, 64, 256, 64, 4, 2"])
    table = cpu_table("--growth")
    assert list(table)[2:] == ["16", "64"]
    assert ratio(table["64"][1]) == 1


@resident
def test_cpu_memory(cpu_table):
    """Ours keeps x, z and a little routing; the loop also keeps its gathered tokens and activations."""
    table = cpu_table("--memory")
    kept = {name: float(table[name][1]) for name in ("ours", "loop", "grouped_mm")}
    assert 1 <= kept["ours"] < 1.25
    assert kept["loop"] > 2 * kept["ours"]
    peaks = {name: float(table[name][2]) for name in kept}
    assert all(peaks[name] > float(table[name][0]) for name in kept)
    assert float(cpu_table("--memory", "--backend", "reference", "--only", "ours")["ours"][1]) < 1


# ---------------------------------------------------------------------------------------------------------------------
# Files, comparison


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run of some tiny cases of every subject."""
    folder = tmp_path_factory.mktemp("bench")
    wanted = {}
    for case in cases.tiny_cases():
        wanted.setdefault((case.subject, case.sweep), []).append(case)
    chosen = [case for group in wanted.values() for case in group[: 2 if group[0].sweep else 1]]
    chosen += [case for case in cases.tiny_cases() if case.shape is cases.TINY_GATED and case.subject == "layer"]
    preset = cases.Preset(cases=tuple(chosen), seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cases.PRESETS, "tiny", lambda: preset)
        run_preset("tiny", folder, device="cpu", threads=1)
    return folder


def test_results_file(tiny):
    """Its schema, which later versions must read or refuse."""
    content = json.loads((tiny / "results.json").read_text())
    assert set(content) == {"format", "preset", "environment", "rows", "skipped"}
    assert {"cpu", "gpu", "threads", "versions"} <= set(content["environment"])
    assert {row["subject"] for row in content["rows"]} == set(cases.SUBJECTS)
    for row in content["rows"]:
        assert set(row) == {field.name for field in dataclasses.fields(results.Row)}
        assert row["time"][1] <= row["time"][0] <= row["time"][2]
        assert row["rounds"] >= 3
        assert math.isfinite(row["over_limit"][0])
    layer = {row["entrant"]: row for row in content["rows"] if row["case"] == "layer-tiny-T9-bf16-fwd+bwd-smoe"}
    assert {arena.OURS, arena.COPY, *(n for n in ON_CPU if peers.PEERS[n].missing() is None)} == set(layer)
    assert min(row["over_best"] for n, row in layer.items() if n not in (arena.OURS, arena.COPY)) == 1
    assert layer["ours"]["saved_bytes"] > 0
    assert layer["ours"]["peak_bytes"] > layer["ours"]["saved_bytes"]
    assert results.Results.read(tiny / "results.json").rows[0].sizes["D"] == 16


def test_report(tiny):
    text = (tiny / "results.md").read_text()
    for expected in ("time / limit", "vs best peer", "saved (MiB)", "exponent", "hf_eager", "megablocks"):
        assert expected in text
    assert {path.name for path in tiny.glob("*.png")} == {"over_limit.png", "peers.png", "memory.png", "growth.png"}


def test_report_without_any_row(tmp_path):
    """Where ours cannot run at all, the report still says why."""
    empty = results.Results(preset="quick", environment=results.environment(CPU), rows=[], skipped=[])
    empty.skipped.append(results.Skipped(case="a", entrant="ours", reason="no compiler"))
    write_report(empty, tmp_path)
    assert "no compiler" in markdown(empty)
    assert not list(tmp_path.glob("*.png"))


def test_comparison_of_a_file_with_itself(tiny, capsys):
    file = str(tiny / "results.json")
    assert main(["bench", "--compare", file, file]) == 0
    assert "0 slower, 0 more memory, 0 faster" in capsys.readouterr().out


def test_comparison_flags_a_slowed_op(tmp_path, monkeypatch, capsys):
    """The experts are made slower for real, and only they are flagged."""
    sizes = dataclasses.replace(cases.CLIP, in_features=256, hidden_features=256)
    case = cases.Case(subject="experts", shape=sizes, tokens=8, dtype="fp32", mode="inference", peers=("loop",))
    preset = cases.Preset(cases=(case,), seconds=0.3, at_least=9)

    def write(name):
        rows, skipped = measure([case], preset, CPU)
        found = results.Results(preset="x", environment=results.environment(CPU), rows=rows, skipped=skipped)
        found.write(tmp_path / name)
        return str(tmp_path / name)

    before = write("before.json")
    forward = Experts.forward

    def slowed(self, *args, **options):
        y = forward(self, *args, **options)
        time.sleep(0.1)
        return y

    monkeypatch.setattr(Experts, "forward", slowed)
    after = write("after.json")
    assert main(["bench", "--compare", before, after]) == 1
    assert "slower" in capsys.readouterr().out
    slower = [change.new.entrant for change in compare_files(before, after, tolerance=2.0).regressions]
    assert slower == ["ours"]


def changed(file: Path, target: Path, entrant: str, **values) -> str:
    content = json.loads(file.read_text())
    for row in content["rows"]:
        if row["entrant"] == entrant:
            row.update({name: change(row[name]) for name, change in values.items() if row[name] is not None})
    target.write_text(json.dumps(content))
    return str(target)


def test_comparison_tells_noise_memory_and_gains(tiny, tmp_path):
    """Overlapping quartiles are noise whatever the medians; memory needs none; faster is not a regression."""
    file, target = tiny / "results.json", tmp_path / "new.json"

    def verdicts(**values):
        new = changed(file, target, "ours", **values)
        return {c.verdict for c in compare_files(file, new).changes if c.new.entrant == "ours"}

    assert verdicts(over_limit=lambda s: [s[0] * 2, s[1], s[2] * 3]) == {"same"}
    assert verdicts(over_limit=lambda s: [s[2] * 2] * 3) == {"slower"}
    assert verdicts(over_limit=lambda s: [s[1] / 2] * 3) == {"faster"}
    assert "more memory" in verdicts(peak_bytes=lambda value: value * 2)


def test_files_that_cannot_be_compared(tiny, tmp_path):
    file = tiny / "results.json"
    other = tmp_path / "other.json"
    for text, expected in (("{", "not JSON"), ('{"format": 99}', "format 99"), ("[]", "format None")):
        other.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            compare_files(file, other)
    content = json.loads(file.read_text())
    other.write_text(json.dumps({**content, "rows": []}))
    with pytest.raises(ConfigError, match="no row in common"):
        compare_files(file, other)


@pytest.mark.parametrize("given", [["benchmarks/"], [".", "--ignore=tests", "--ignore=libmoe_fast"]])
def test_pytest_suite_measures_with_the_flag(given, tmp_path):
    """`pytest benchmarks/ --benchmark`, or from the root: pytest-benchmark's own table and file, and our report."""
    command = [sys.executable, "-m", "pytest", *given, "-k", "permutation", "--benchmark", "--preset", "tiny"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'own.json'}", f"--results={tmp_path / 'out'}"]
    command += ["--threads", "1"]
    # A session of its own: to a child that sees the variables of a parallel worker, pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "time / limit" in done.stdout
    own = json.loads((tmp_path / "own.json").read_text())["benchmarks"]
    assert {b["group"] for b in own} == {"permutation"}
    written = results.Results.read(tmp_path / "out" / "results.json")
    assert written.environment["threads"] == 1
    ours = [r for r in written.rows if r.entrant == "ours"]
    assert len(own) == len(ours) == 2
    for benchmark, row in zip(own, ours, strict=True):
        assert benchmark["stats"]["rounds"] == row.rounds >= 3


def test_records_of_a_small_file(capsys):
    """What `python benchmarks/records.py` prints of 665,298 records, of 300."""
    from libmoe_fast.benchmarks import records

    assert records.main(["--records", "300", "--processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("300 records, ")
    assert len(lines) == 6
    assert all(re.search(r"\d", line[50:]) for line in lines[1:])
