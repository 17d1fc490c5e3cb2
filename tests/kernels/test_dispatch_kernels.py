"""Routing and permutation kernels, forward and backward, against reference.route and the losses in float64."""

import pytest
import torch
from dispatch_checks import BUILT_IN, MISSING, USER_MADE, DispatchCase, check_missing, sorted_choices
from kernel_checks import DEVICE, check_dispatch, dispatch_data, load_kernels, run_dispatch

from libmoe_fast import reference

KERNELS = load_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_built_in_routers(router, dtype):
    """N not a power of two, sequences that fill no block, D of one and a half steps."""
    check_dispatch(KERNELS, DispatchCase(router=router, D=200, dtype=dtype))


@pytest.mark.parametrize("router", USER_MADE.values(), ids=USER_MADE)
def test_user_made_routers(router):
    check_dispatch(KERNELS, DispatchCase(router=router))


@pytest.mark.parametrize(
    "router", [BUILT_IN["cosine"], BUILT_IN["perturbed"], BUILT_IN["sigmoid-softmax"], {}], ids=str
)
def test_learned_temperature(router):
    check_dispatch(KERNELS, DispatchCase(router=router, learn_temperature=True))


SIZES = [
    pytest.param({"N": 2, "K": 1}, id="fewest-experts"),
    pytest.param({"N": 1, "K": 1}, id="one-expert"),
    pytest.param({"N": 9, "K": 9}, id="K=N"),
    pytest.param({"N": 64, "K": 8}, id="fine-grained"),  # several steps of choices in a block
    pytest.param({"N": 250, "K": 3, "tokens": 20, "sequences": 1}, id="most-experts"),
    pytest.param({"tokens": 1, "sequences": 1}, id="one-token"),
    pytest.param({"tokens": 141, "sequences": 3}, id="blocks-cross-no-sequence"),  # 47 tokens: blocks of 32 and 15
    pytest.param({"tokens": 300, "sequences": 1, "D": 8}, id="dW-in-two-parts"),
    pytest.param({"D": 520}, id="dx-in-three-slices"),
    pytest.param({"tokens": 20, "sequences": 20, "N": 250, "K": 1}, id="counts-in-five-steps"),  # 20 blocks, 4 a step
    pytest.param({"tokens": 280, "sequences": 2, "N": 250, "K": 1}, id="losses-in-three-steps"),  # 9 blocks, 4 a step
    pytest.param({"D": 1}, id="D=1"),
    pytest.param({"D": 128}, id="D-a-whole-step"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", [BUILT_IN["smoe"], BUILT_IN["perturbed"]], ids=["smoe", "perturbed"])
def test_sizes(router, size):
    check_dispatch(KERNELS, DispatchCase(router=router, **size))


def test_a_program_of_permute_takes_several_blocks(monkeypatch):
    """As with many tokens. 3 sequences of 3 blocks, the last of 15 tokens, in programs of 4: they cross sequences."""
    monkeypatch.setattr(KERNELS.dispatch, "PERMUTE_PROGRAMS", 3)
    check_dispatch(KERNELS, DispatchCase(router=BUILT_IN["smoe"], tokens=3 * 79, sequences=3))


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("router", [BUILT_IN["smoe"], BUILT_IN["sigmoid-none"]], ids=["smoe", "sigmoid"])
def test_balance_over_all_choices(router, sequences):
    check_dispatch(KERNELS, DispatchCase(router=router, over="topk", sequences=sequences))


@pytest.mark.parametrize("router", [BUILT_IN["cosine"], BUILT_IN["smoe-learned-noise"]], ids=["cosine", "learned"])
def test_float32_router_on_bfloat16_tokens(router):
    """As hyper's generated gate always is; the scores keep the precision of both."""
    check_dispatch(KERNELS, DispatchCase(router=router, dtype=torch.bfloat16, router_dtype=torch.float32))


@pytest.mark.parametrize("missing", MISSING)
def test_gradients_that_may_be_missing(missing):
    case = DispatchCase(router=BUILT_IN["cosine"])
    check_missing(lambda given: run_dispatch(KERNELS, case, given), dispatch_data(case), missing)


# ---------------------------------------------------------------------------------------------------------------------
# Choices that are hard to make


def choose(case: DispatchCase, data) -> tuple:
    inputs = KERNELS.dispatch.RouterInputs(data.x, data.w, data.bias)
    return KERNELS.dispatch.dispatch(
        inputs,
        spec=case.spec,
        temperature=1.0,
        sequences=1,
        over_topk=False,
        balance_coef=0.0,
        z_coef=0.0,
    )


@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_ties_go_to_the_lowest_index(router):
    """Experts 1 and 4 are the same, and token 0 is zero: as reference.route chooses, and stably sorted."""
    case = DispatchCase(router=router | {"noise": "off", "noise_std": 0.0}, sequences=1, dtype=torch.bfloat16)
    data = dispatch_data(case)
    data.w[4] = data.w[1]
    data.x[0] = 0
    if data.bias is not None:
        data.bias.fill_(0.25)
    routed, permuted, _ = choose(case, data)
    expected = reference.route(data.x, data.w, data.bias, spec=case.spec)
    assert routed.index[0].tolist() == [0, 1, 2]
    assert torch.equal(routed.index, expected.index)
    chosen = routed.index.tolist()
    assert any(4 in row for row in chosen)
    assert all(1 in row[: row.index(4)] for row in chosen if 4 in row)
    for actual, wanted in zip(permuted, sorted_choices(expected.index, case.N), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, below the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_a_bad_token_chooses_distinct_experts(router, bad):
    """Anything else would write outside the permutation, and spoil the other tokens' results."""
    case = DispatchCase(router=router | {"noise": "off", "noise_std": 0.0}, sequences=1)
    data = dispatch_data(case)
    clean, _, _ = choose(case, data)
    data.x[7] = bad
    routed, permuted, _ = choose(case, data)
    assert sorted(set(routed.index[7].tolist())) == sorted(routed.index[7].tolist())
    assert routed.index.min() >= 0
    assert routed.index.max() < case.N
    others = torch.arange(case.tokens, device=DEVICE) != 7
    assert torch.equal(routed.index[others], clean.index[others])
    assert torch.equal(routed.weights[others], clean.weights[others])
    for actual, wanted in zip(permuted, sorted_choices(routed.index, case.N), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_zero_rows_have_finite_cosine_gradients(tau):
    """A zero token and a zero gate row: norm 0, where the gradient of the norm is taken as 0."""
    case = DispatchCase(router=BUILT_IN["cosine"] | {"tau": tau})
    data = dispatch_data(case)
    data.x[3] = 0
    data.w[2] = 0
    ours = run_dispatch(KERNELS, case, data)
    assert all(value.isfinite().all() for value in ours.values())


# ---------------------------------------------------------------------------------------------------------------------
# Permutation of an index that another router made


@pytest.mark.parametrize("programs", [2, 10_000], ids=["several-blocks-a-program", "one-block-a-program"])
@pytest.mark.parametrize(
    ("shape", "num_experts", "kind"),
    [
        pytest.param((1, 1), 1, "random", id="one-choice"),
        pytest.param((50, 3), 6, "random", id="part-of-a-block"),
        pytest.param((128, 2), 4, "random", id="a-whole-block"),
        pytest.param((300, 3), 5, "random", id="several-blocks"),
        pytest.param((300, 3), 5, "constant", id="one-takes-all"),
        pytest.param((70, 8), 64, "random", id="several-steps-in-a-block"),
        pytest.param((40, 2), 250, "random", id="more-experts-than-choices"),
        pytest.param((4200, 1), 256, "random", id="counts-in-two-steps"),  # 17 blocks, 16 a step
    ],
)
def test_permute_is_a_stable_sort(shape, num_experts, kind, programs, monkeypatch):
    monkeypatch.setattr(KERNELS.dispatch, "PERMUTE_PROGRAMS", programs)
    torch.manual_seed(0)
    index = torch.randint(num_experts, shape) if kind == "random" else torch.full(shape, num_experts - 1)
    index = index.to(DEVICE)
    permuted = KERNELS.dispatch.permute(index, num_experts)
    for actual, wanted in zip(permuted, sorted_choices(index, num_experts), strict=True):
        assert torch.equal(actual, wanted)
