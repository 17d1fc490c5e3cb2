"""Fused routing on the CPU, forward and backward, against reference.route and the losses in float64."""

import dataclasses

import pytest
import torch
from dispatch_checks import (
    BALANCE_COEF,
    BUILT_IN,
    MISSING,
    USER_MADE,
    Z_COEF,
    DispatchCase,
    DispatchData,
    check_missing,
    compare_dispatch,
    dispatch_data,
    sorted_choices,
    torch_dispatch,
)

from libmoe_fast import extension, reference
from libmoe_fast.routers import ROUTERS, build_router
from libmoe_fast.spec import RouterSpec, decode_spec, routed_shapes

pytestmark = pytest.mark.skipif(not extension.load().loaded, reason="the C++ extension is not built")
lib = torch.ops.libmoe_fast


def forward_arguments(case: DispatchCase, data: DispatchData) -> tuple:
    router = (data.x, data.w, data.bias, data.noise, data.noise_w, data.temperature)
    temperature = 1.0 if case.learn_temperature else case.temperature
    options = (temperature, case.spec.encoded, case.sequences, case.over == "topk", BALANCE_COEF, Z_COEF)
    return (*router, data.aux_scale, *options)


def backward_arguments(case: DispatchCase, data: DispatchData, outputs: list[torch.Tensor]) -> tuple:
    *router, temperature, spec, _, _, balance_coef, z_coef = forward_arguments(case, data)
    _rows, *routed, _order, inverse, _offsets, _losses, _share, first_share = outputs
    options = (routed, inverse, first_share, temperature, spec, balance_coef, z_coef)
    return (data.dxs, data.dweights, data.dlosses, *router, *options)


def run_dispatch(case: DispatchCase, data: DispatchData) -> dict[str, torch.Tensor]:
    """The ops, forward and backward."""
    outputs = lib.cpu_dispatch(*forward_arguments(case, data))
    grads = iter(lib.cpu_dispatch_backward(*backward_arguments(case, data, outputs)))
    _rows, *routed, order, inverse, offsets, losses, share, _ = outputs
    learned = {"dx": data.x, "dw": data.w, "dbias": data.bias, "dnoise_w": data.noise_w}
    learned["dtemperature"] = data.temperature
    names = [name for name, shape in routed_shapes(case.spec, case.tokens, data.noise is not None).items() if shape]
    kept = dict(zip(names, routed, strict=True))
    return {
        **{name: kept[name] for name in ("index", "weights", "probs", "logits")},
        "order": order,
        "inverse": inverse,
        "offsets": offsets,
        "losses": losses,
        "share": share,
        **{name: next(grads) for name, tensor in learned.items() if tensor is not None},
    }


def check(case: DispatchCase) -> None:
    data = dispatch_data(case)
    compare_dispatch(case, data, run_dispatch(case, data))


def test_the_built_in_specs_are_those_of_the_routers():
    """So that the table above cannot fall behind."""
    options = {
        "smoe-gaussian": {"noise": "gaussian", "noise_std": 0.6},
        "smoe-learned-noise": {"noise": "learned"},
        "sigmoid-sum": {"normalize": "sum"},
        "sigmoid-none": {"normalize": "none"},
    }
    names = {"perturbed": "perturbed_cosine"}
    for case, fields in BUILT_IN.items():
        name = names.get(case, case.split("-")[0])
        router = build_router(name, 8, 6, 3, **options.get(case, {}))
        spec = dataclasses.replace(router.spec, noise_std=fields.get("noise_std", 0.0))  # of no use without noise
        assert spec == DispatchCase(router=fields).spec, case
    those_of_v2 = {name for name, router in ROUTERS.items() if router.__module__.endswith("routers_v2")}
    assert {names.get(case, case.split("-")[0]) for case in BUILT_IN} == ROUTERS.keys() - those_of_v2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_built_in_routers(router, dtype):
    """N not a power of two, D no multiple of a vector, sequences that fill no block."""
    check(DispatchCase(router=router, D=203, dtype=dtype))


@pytest.mark.parametrize("router", USER_MADE.values(), ids=USER_MADE)
def test_user_made_routers(router):
    check(DispatchCase(router=router))


@pytest.mark.parametrize("router", [BUILT_IN["perturbed"], BUILT_IN["sigmoid-softmax"], {}], ids=str)
def test_learned_temperature(router):
    check(DispatchCase(router=router, learn_temperature=True))


SIZES = [
    pytest.param({"N": 1, "K": 1}, id="one-expert"),
    pytest.param({"N": 9, "K": 9}, id="K=N"),
    pytest.param({"N": 64, "K": 8}, id="fine-grained"),
    pytest.param({"N": 1000, "K": 3, "tokens": 20, "sequences": 1}, id="most-experts"),
    pytest.param({"tokens": 1, "sequences": 1}, id="one-token"),
    pytest.param({"tokens": 141, "sequences": 3}, id="blocks-cross-no-sequence"),  # 47 tokens: blocks of 32 and 15
    pytest.param({"tokens": 1100, "sequences": 1, "D": 8}, id="dW-in-three-sums"),
    pytest.param({"D": 1}, id="D=1"),
    pytest.param({"D": 300}, id="dW-in-three-tasks"),  # of 128 columns
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("router", [BUILT_IN["smoe"], BUILT_IN["perturbed"]], ids=["smoe", "perturbed"])
def test_sizes(router, size):
    check(DispatchCase(router=router, **size))


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("router", [BUILT_IN["smoe"], BUILT_IN["sigmoid-none"]], ids=["smoe", "sigmoid"])
def test_balance_over_all_choices(router, sequences):
    check(DispatchCase(router=router, over="topk", sequences=sequences))


@pytest.mark.parametrize("router", [BUILT_IN["cosine"], BUILT_IN["smoe-learned-noise"]], ids=["cosine", "learned"])
def test_float32_router_on_bfloat16_tokens(router):
    """As hyper's generated gate always is; the scores keep the precision of both."""
    check(DispatchCase(router=router, dtype=torch.bfloat16, router_dtype=torch.float32))


def test_float64_is_float64():
    """Finite differences need it: as exact as PyTorch's own float64, so their difference is rounding."""
    case = DispatchCase(router=BUILT_IN["perturbed"], dtype=torch.float64, learn_temperature=True)
    data = dispatch_data(case)
    data = DispatchData(*(None if t is None else t.double() for t in data))
    ours, exact = run_dispatch(case, data), torch_dispatch(case, data, None)
    for name, truth in exact.items():
        torch.testing.assert_close(ours[name], truth, rtol=1e-12, atol=1e-12)


def test_non_contiguous_input():
    case = DispatchCase(router=BUILT_IN["cosine"])
    data = dispatch_data(case)
    strided = DispatchData(*(t.repeat_interleave(2, -1)[..., ::2] if t is not None and t.dim() else t for t in data))
    assert not strided.x.is_contiguous()
    for name, value in run_dispatch(case, data).items():
        assert torch.equal(run_dispatch(case, strided)[name], value), name


@pytest.mark.parametrize("missing", MISSING)
def test_gradients_that_may_be_missing(missing):
    case = DispatchCase(router=BUILT_IN["cosine"])
    check_missing(lambda given: run_dispatch(case, given), dispatch_data(case), missing)


@pytest.mark.parametrize("router", [BUILT_IN["smoe-learned-noise"], BUILT_IN["perturbed"]], ids=["learned", "cosine"])
def test_bits_do_not_depend_on_the_number_of_threads(router):
    case = DispatchCase(router=router, N=20, tokens=600, D=200, dtype=torch.bfloat16)
    data = dispatch_data(case)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_dispatch(case, data))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


# ---------------------------------------------------------------------------------------------------------------------
# Choices that are hard to make


@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_ties_go_to_the_lowest_index(router):
    """Experts 1 and 4 are the same, and token 0 is zero: as reference.route chooses, and stably sorted."""
    case = DispatchCase(router=router | {"noise": "off", "noise_std": 0.0}, sequences=1, dtype=torch.bfloat16)
    data = dispatch_data(case)
    data.w[4] = data.w[1]
    data.x[0] = 0
    if data.bias is not None:
        data.bias.fill_(0.25)
    ours = run_dispatch(case, data)
    expected = reference.route(data.x, data.w, data.bias, spec=case.spec, temperature=case.temperature).index
    assert ours["index"][0].tolist() == [0, 1, 2]
    assert torch.equal(ours["index"], expected)
    assert any(4 in row for row in expected.tolist())
    for name, wanted in zip(("order", "inverse", "offsets"), sorted_choices(expected, case.N), strict=True):
        assert torch.equal(ours[name], wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_a_bad_token_chooses_distinct_experts(router, bad):
    """Anything else would write outside the permutation, and spoil the other tokens' results."""
    case = DispatchCase(router=router | {"noise": "off", "noise_std": 0.0}, sequences=1)
    data = dispatch_data(case)
    clean = run_dispatch(case, data)
    data.x[7] = bad
    ours = run_dispatch(case, data)
    assert len(set(ours["index"][7].tolist())) == case.K
    others = torch.arange(case.tokens) != 7
    assert torch.equal(ours["index"][others], clean["index"][others])
    assert torch.equal(ours["weights"][others], clean["weights"][others])
    for name, wanted in zip(("order", "inverse", "offsets"), sorted_choices(ours["index"], case.N), strict=True):
        assert torch.equal(ours[name], wanted)


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_zero_rows_have_finite_cosine_gradients(tau):
    """A zero token and a zero gate row: norm 0, where the gradient of the norm is taken as 0."""
    case = DispatchCase(router=BUILT_IN["cosine"] | {"tau": tau})
    data = dispatch_data(case)
    data.x[3] = 0
    data.w[2] = 0
    assert all(value.isfinite().all() for value in run_dispatch(case, data).values())


def test_no_tokens():
    case = DispatchCase(router=BUILT_IN["perturbed"])
    data = dispatch_data(case)
    none = data._replace(x=data.x[:0], dxs=data.dxs[:0], dweights=data.dweights[:0])
    outputs = lib.cpu_dispatch(*forward_arguments(case, none))
    dx, dw, dbias = lib.cpu_dispatch_backward(*backward_arguments(case, none, outputs))
    assert dx.shape == (0, case.D)
    for zero in (outputs[-3], outputs[-2], dw, dbias):  # losses, share
        assert (zero == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The ops


@pytest.mark.parametrize(
    "case",
    [
        DispatchCase(router=BUILT_IN["smoe-learned-noise"]),
        DispatchCase(router=BUILT_IN["cosine"], learn_temperature=True),
        DispatchCase(router=BUILT_IN["hyper"]),
    ],
    ids=["learned-noise", "learned-temperature", "hyper"],
)
def test_opcheck(case):
    """Schemas, fakes, autograd registration and dynamic-shape AOT dispatch."""
    data = dispatch_data(case)
    outputs = lib.cpu_dispatch(*forward_arguments(case, data))
    torch.library.opcheck(lib.cpu_dispatch_backward.default, backward_arguments(case, data, outputs))
    for learned in (data.x, data.w, data.bias, data.noise_w, data.temperature):
        if learned is not None:
            learned.requires_grad_()
    torch.library.opcheck(lib.cpu_dispatch.default, forward_arguments(case, data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(40, 23)}, r"expected `weight` with shape \[N, D\] = \[6, 23\], got \[6, 24\]"),
        ({"x": torch.zeros(40, 24, dtype=torch.int64)}, "expected `x` in bfloat16, float16, float32 or float64"),
        ({"x": torch.zeros(40, 0)}, "expected `D` from 1 to .*, got 0"),
        ({"bias": None}, "expected a `bias`, as `spec` says"),
        ({"noise": torch.zeros(3, 6)}, r"expected `noise` with shape \[T, N\] = \[40, 6\], got \[3, 6\]"),
        ({"spec": "num_experts=6 top_k=3"}, "expected `spec` as RouterSpec.encoded makes it, with a known `score`"),
        ({"spec": RouterSpec(num_experts=6, top_k=3).encoded.replace("top_k=3", "top_k=7")}, "`top_k` from 1 to 6"),
        ({"sequences": 7}, "expected `sequences` to divide T = 40, got 7"),
    ],
)
def test_a_bad_argument_is_named(change, message):
    case = DispatchCase(router=BUILT_IN["cosine"])
    schema = [argument.name for argument in lib.cpu_dispatch.default._schema.arguments]
    arguments = dict(zip(schema, forward_arguments(case, dispatch_data(case)), strict=True))
    with pytest.raises(RuntimeError, match=f"libmoe_fast::cpu_dispatch: .*{message}"):
        lib.cpu_dispatch(**(arguments | change))


@pytest.mark.parametrize("router", BUILT_IN.values(), ids=BUILT_IN)
def test_a_spec_survives_its_encoding(router):
    spec = DispatchCase(router=router).spec
    assert decode_spec(spec.encoded) == spec
