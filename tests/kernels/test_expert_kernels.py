"""Grouped GEMMs and combine, forward and backward, against a loop over experts in float64."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    LAST_ROUND,
    ExpertCase,
    check_experts,
    expert_data,
    load_kernels,
    run_experts,
)

from libmoe_fast.kernels import tiles
from libmoe_fast.kernels.run import INTERPRETER_PROGRAMS, observing
from libmoe_fast.kernels.tiles import Tile
from libmoe_fast.reference import ACTIVATIONS

KERNELS = load_kernels()
ODD = {
    "D": 72,
    "H": 269,
    "O": 40,
    "T": 40,
    "N": 4,
    "K": 2,
}  # 269 = 4304 / 16, SigLIP's; nothing is a multiple of a tile, and O != D


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated):
    check_experts(KERNELS, ExpertCase(activation=activation, gated=gated))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [(False, False), (True, False), (False, True)], ids=["none", "first", "second"])
def test_biases(bias, gated):
    check_experts(KERNELS, ExpertCase(bias=bias, gated=gated))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_at_odd_sizes(dtype, gated):
    check_experts(KERNELS, ExpertCase(**ODD, dtype=dtype, gated=gated, activation="silu" if gated else "gelu"))


@pytest.mark.parametrize(
    "size",
    [
        pytest.param({"N": 2, "K": 1}, id="fewest-experts"),
        pytest.param({"N": 1, "K": 1}, id="one-expert"),
        pytest.param({"N": 3, "K": 3}, id="K=N"),
        pytest.param({"N": 64, "K": 8, "T": 12}, id="fine-grained"),
        pytest.param({"T": 1}, id="one-token"),
        pytest.param({"D": 1, "H": 1, "O": 1}, id="width-1"),
        pytest.param({"D": 64, "H": 128, "O": 64}, id="whole-tiles"),
        pytest.param(LAST_ROUND, id="last-round-in-parts"),
        pytest.param(LAST_ROUND | {"H": 200}, id="last-round-with-an-empty-part"),  # 4 steps in parts of 2
        pytest.param({"T": 150, "N": 2, "K": 2, "H": 140}, id="several-row-tiles-per-expert"),
    ],
)
def test_sizes(size):
    check_experts(KERNELS, ExpertCase(**size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("load", "K"), [("some idle", 3), ("one takes all", 1)])
def test_loads(load, K, dtype):
    """Idle experts get gradients that are zero, not what was in the memory; check_experts allows no error where the
    truth is zero."""
    case = ExpertCase(load=load, K=K, T=140, dtype=dtype)
    check_experts(KERNELS, case)
    grads = run_experts(KERNELS, case, expert_data(case))
    idle = torch.ones(case.N, dtype=torch.bool, device=DEVICE)
    idle[expert_data(case).index.unique()] = False
    assert idle.any()
    for name in ("dw1", "db1", "dw2", "db2"):
        assert not grads[name][idle].any(), name


def test_idle_gradients_are_written(monkeypatch):
    """Memory that was never written would hold NaN here."""

    def poisoned(like, **options):
        return torch.full_like(like, float("nan"), **options)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    case = ExpertCase(load="one takes all", K=1)
    grads = run_experts(KERNELS, case, expert_data(case))
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gpt_oss_beyond_its_limits(gated, dtype):
    """Two thirds of the pre-activations lie far above or far below what is cut off."""
    check_experts(KERNELS, ExpertCase(activation="gpt_oss", gated=gated, far=True, dtype=dtype))


@pytest.fixture
def poisoned_memory(monkeypatch):
    """What torch.empty and its like give out is NaN until it is written."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("descriptors", "counted"),
    [
        pytest.param(False, False, id="pointers"),
        pytest.param(True, False, id="descriptors"),
        pytest.param(True, True, id="one row for all of them"),
    ],
)
def test_choices_that_no_expert_runs(descriptors, counted, dtype, gated, poisoned_memory, monkeypatch):
    """They add nothing and have no gradient, and what nobody wrote of them does not show: a descriptor reads it."""
    if DEVICE == "cpu":
        monkeypatch.setattr(KERNELS.experts, "descriptors_usable", lambda *_: descriptors)
    assert torch.empty(1).isnan().all()
    # Rows of 16 bytes, for descriptors.
    case = ExpertCase(O=24, load="some free", T=140, dtype=dtype, gated=gated, counted=counted)
    data = expert_data(case)
    assert ((data.index >= case.N).any(1) & (data.index < case.N).any(1)).any()
    check_experts(KERNELS, case)
    assert not run_experts(KERNELS, case, data)["dweights"][data.index >= case.N].any()


def test_no_choice_is_an_experts(poisoned_memory):
    """A process among several may hold none of the experts that were chosen."""
    case = ExpertCase(K=2, load="all free", counted=True)
    for value in run_experts(KERNELS, case, expert_data(case)).values():
        assert not value.any()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU, the table of tiles decides")
@pytest.mark.parametrize(
    ("tile", "gated"),
    [
        pytest.param(Tile(BM=32, BN=256, BK=64, GROUP=8), False, id="wide"),  # epilogues in pieces; one column tile
        pytest.param(Tile(BM=32, BN=256, BK=64, GROUP=8), True, id="wide-gated"),
        pytest.param(Tile(BM=128, BN=32, BK=16, GROUP=3), False, id="tall"),  # no pieces; a group that does not divide
        pytest.param(Tile(BM=16, BN=128, BK=128, GROUP=1), True, id="deep-gated"),
    ],
)
def test_tiles_of_other_shapes(gated, tile, monkeypatch):
    """BM, BN and BK differ, so that none can stand in for another; read through pointers, then through descriptors."""
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", tile)
    case = ExpertCase(D=48, H=176, O=32, N=3, K=2, T=60, gated=gated)
    check_experts(KERNELS, case)
    monkeypatch.setattr(KERNELS.experts, "descriptors_usable", lambda *_: True)
    check_experts(KERNELS, case)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU, float32 products are laid out as they are fastest")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_weights_laid_out_the_other_way(descriptors, gated, monkeypatch):
    """Up and down on transposed weights, da and dx on K-major ones."""
    turned = []

    def other(weight, rows, precision, *, k_major):
        turned.append(k_major)
        return weight.transpose(1, 2).contiguous(), not k_major

    monkeypatch.setattr(KERNELS.experts, "laid_out", other)
    monkeypatch.setattr(KERNELS.experts, "descriptors_usable", lambda *_: descriptors)
    check_experts(KERNELS, ExpertCase(D=48, H=176, O=32, N=3, K=2, T=60, gated=gated))
    assert turned == [True, True, False, False]


@pytest.mark.parametrize(("gated", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=str)
def test_operands_through_descriptors(gated, dtype, monkeypatch):
    """The path of sm90 and newer. Its bounds must keep a tile at an expert's edge from reading the next one's weight;
    and the next one's rows, which it does read, must not enter an expert's gradient.
    """
    if DEVICE == "cpu":
        monkeypatch.setattr(KERNELS.experts, "descriptors_usable", lambda *_: True)
    case = ExpertCase(D=80, H=144, O=48, gated=gated, dtype=dtype)
    through = []
    with observing(lambda launch: through.append(launch.args.get("DESCRIPTOR"))):
        check_experts(KERNELS, case)
    if DEVICE == "cpu":
        assert through.count(True) == 6  # up, down, da, dw2, dw1, dx


def test_programs_walk_over_several_tiles():
    """Else the persistent loop would run once in every comparison of this file."""
    case, grids = ExpertCase(**ODD), {}
    data = expert_data(case)
    busy = data.index.unique().numel()  # each has a row tile at least
    with observing(lambda launch: grids.setdefault(launch.gemm, launch.grid({"BM": 64, "BN": 64, "PROGRAMS": 1}))):
        run_experts(KERNELS, case, data)
    if DEVICE == "cpu":
        assert [grids[gemm] for gemm in ("up", "down", "da", "dx")] == [(INTERPRETER_PROGRAMS,)] * 4
        assert busy > INTERPRETER_PROGRAMS


def test_z_is_kept_only_for_training():
    case = ExpertCase(gated=True)
    data = expert_data(case)
    permuted = KERNELS.dispatch.permute(data.index, case.N)
    expert = KERNELS.experts.ExpertWeights(*data.params, case.activation, case.gated)
    results = [
        KERNELS.experts.experts(data.x, data.weights, permuted, expert, store_z=store_z) for store_z in (True, False)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].shape == (case.T * case.K, 2 * case.H)
    assert results[1][1] is None


def test_frozen_experts_launch_no_weight_gradients():
    case, names = ExpertCase(), []
    data = expert_data(case)
    full = run_experts(KERNELS, case, data)
    with observing(lambda launch: names.append(launch.name)):
        frozen = run_experts(KERNELS, case, data, weight_grads=False)
    assert "weight_grad" not in names
    assert frozen.keys() == {"y", "dx", "dweights"}
    assert all(torch.equal(frozen[name], full[name]) for name in frozen)


def test_a_launch_lowers_the_flags_that_it_raised():
    """The tuner launches a kernel many times over: each waits for its own parts, not for those of the one before."""
    launches = []
    case = ExpertCase(**LAST_ROUND)
    with observing(launches.append):
        run_experts(KERNELS, case, expert_data(case))
    flags = [launch.args["flags_ptr"] for launch in launches if launch.gemm in ("down", "dx")]
    assert len(flags) == 2
    assert not any(each.any() for each in flags)
