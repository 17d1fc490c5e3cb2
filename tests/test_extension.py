"""The C++ ops against an independent truth in NumPy float64, and the extension's own account of itself.

tests/abi/check.py runs this file under several torch versions, in environments that hold little else: it imports only
torch, NumPy, pytest, hypothesis and libmoe_fast.extension.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from libmoe_fast import extension

pytestmark = pytest.mark.skipif(
    extension.torch_version() < extension.TORCH_FLOOR, reason="this torch is too old for the extension (setup.py)"
)
STATE = extension.load()
OPS = torch.ops.libmoe_fast

SHAPES = [
    # T, N, K, D
    pytest.param(0, 4, 2, 8, id="no-tokens"),
    pytest.param(1, 1, 1, 1, id="one-of-everything"),
    pytest.param(7, 6, 3, 5, id="nothing-divides-a-vector"),
    pytest.param(5, 4, 4, 16, id="every-expert-chosen"),
    pytest.param(3, 64, 2, 33, id="most-experts-empty"),
    pytest.param(33, 64, 8, 1030, id="wider-than-two-column-blocks"),
    pytest.param(9000, 4, 2, 3, id="a-slice-per-thread"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}  # bits, the hidden one too


def choices(tokens: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """index [T, K] of distinct experts per token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices


def normal(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def true_order(index: torch.Tensor) -> np.ndarray:
    return np.argsort(index.numpy().reshape(-1), kind="stable")


def true_inverse(index: torch.Tensor) -> np.ndarray:
    return np.argsort(true_order(index), kind="stable")


def assert_rounded_once(result: torch.Tensor, truth: np.ndarray, magnitude: np.ndarray, terms: int) -> None:
    """`result` is `truth` to half a unit of its own dtype, plus the error of `terms` fp32 (fp64) sums and products.

    magnitude: the sum of the terms' absolute values. A sum kept in a 16-bit type fails this by orders of magnitude.
    """
    sums = 53 if result.dtype == torch.float64 else 24
    accumulation = (terms + 1) * 2.0**-sums * magnitude
    exponent = np.floor(np.log2(np.maximum(np.abs(truth), 2.0**-14)))
    rounding = 2.0 ** (exponent - SIGNIFICAND[result.dtype])  # half a unit in the last place
    error = np.abs(float64(result) - truth)
    assert error.shape == truth.shape
    assert (error <= rounding * 1.001 + accumulation).all(), f"off by up to {error.max()}"


@pytest.fixture
def threads():
    """Sets torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_extension_is_loaded():
    assert STATE.loaded, f"{STATE.reason}: {STATE.hint}"
    assert STATE.path
    assert STATE.built_with
    assert STATE.reason is None


# permute_index --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "width"), SHAPES)
def test_permute_index_is_a_stable_sort(tokens, num_experts, top_k, width):
    index = choices(tokens, num_experts, top_k)
    order, inverse, offsets = OPS.permute_index(index, num_experts)
    assert order.dtype == inverse.dtype == offsets.dtype == torch.int64
    np.testing.assert_array_equal(order.numpy(), true_order(index))
    np.testing.assert_array_equal(inverse.numpy(), true_inverse(index))
    counts = np.bincount(index.numpy().reshape(-1), minlength=num_experts)
    np.testing.assert_array_equal(offsets.numpy(), np.concatenate([[0], np.cumsum(counts)]))


def test_permute_index_with_one_expert_taking_all():
    order, inverse, offsets = OPS.permute_index(torch.full((5, 2), 2), 4)
    assert order.tolist() == inverse.tolist() == list(range(10))
    assert offsets.tolist() == [0, 0, 0, 10, 10]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data(), num_experts=st.integers(1, 9), top_k=st.integers(1, 4), tokens=st.integers(0, 40))
def test_permute_index_properties(data, num_experts, top_k, tokens):
    """order and inverse undo each other; experts ascend, and flat ids within one. A token's choices need not differ."""
    expert = st.integers(0, num_experts - 1)
    flat = data.draw(st.lists(expert, min_size=tokens * top_k, max_size=tokens * top_k))
    index = torch.tensor(flat, dtype=torch.int64).reshape(tokens, top_k)
    order, inverse, offsets = OPS.permute_index(index, num_experts)
    assert order[inverse].tolist() == inverse[order].tolist() == list(range(tokens * top_k))
    keys = [(flat[i], i) for i in order.tolist()]
    assert keys == sorted(keys)
    for e in range(num_experts):
        assert {flat[i] for i in order[offsets[e] : offsets[e + 1]].tolist()} <= {e}
    assert (offsets[0], offsets[-1]) == (0, tokens * top_k)


# gather, weighted_scatter, row_dot ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "width"), SHAPES)
def test_gather(tokens, num_experts, top_k, width, dtype):
    index = choices(tokens, num_experts, top_k)
    order = torch.from_numpy(true_order(index))
    x = normal(tokens, width, dtype=dtype)
    out = OPS.gather(x, order, top_k)
    assert out.dtype == dtype
    np.testing.assert_array_equal(float64(out), float64(x)[order.numpy() // top_k])


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32-weights", "weights-like-x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "width"), SHAPES)
def test_gather_with_weights(tokens, num_experts, top_k, width, dtype, weight_dtype):
    index = choices(tokens, num_experts, top_k)
    order = torch.from_numpy(true_order(index))
    x = normal(tokens, width, dtype=dtype)
    weights = normal(tokens, top_k, dtype=weight_dtype or dtype, seed=2)
    out = OPS.gather(x, order, top_k, weights)
    truth = float64(x)[order.numpy() // top_k] * float64(weights).reshape(-1)[order.numpy(), None]
    assert out.dtype == dtype
    assert_rounded_once(out, truth, np.abs(truth), terms=1)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "width"), SHAPES)
def test_weighted_scatter(tokens, num_experts, top_k, width, dtype, weighted):
    index = choices(tokens, num_experts, top_k)
    inverse = torch.from_numpy(true_inverse(index))
    y = normal(tokens * top_k, width, dtype=dtype)
    weights = normal(tokens, top_k, dtype=torch.float32, seed=2) if weighted else None
    out = OPS.weighted_scatter(y, inverse, top_k, weights)
    terms = float64(y)[inverse.numpy()].reshape(tokens, top_k, width)
    if weighted:
        terms = terms * float64(weights)[..., None]
    assert out.dtype == dtype
    assert_rounded_once(out, terms.sum(axis=1), np.abs(terms).sum(axis=1), top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "width"), SHAPES)
def test_row_dot(tokens, num_experts, top_k, width, dtype):
    index = choices(tokens, num_experts, top_k)
    inverse = torch.from_numpy(true_inverse(index))
    a = normal(tokens * top_k, width, dtype=dtype)
    b = normal(tokens, width, dtype=dtype, seed=2)
    out = OPS.row_dot(a, b, inverse, top_k)
    terms = float64(a)[inverse.numpy()].reshape(tokens, top_k, width) * float64(b)[:, None]
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_rounded_once(out, terms.sum(axis=2), np.abs(terms).sum(axis=2), width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_round_to_even_after_an_exact_sum(dtype):
    """1 + 2^-p lies halfway between two values of a p-bit type: it goes to the even one, from both sides of it."""
    half = 2.0 ** -SIGNIFICAND[dtype]
    y = torch.tensor([[1.0, 1.0 + 2 * half], [half, half], [0.0, 0.0]], dtype=dtype)
    out = OPS.weighted_scatter(y, torch.tensor([0, 1, 2]), 3)
    assert float64(out).tolist() == [[1.0, 1.0 + 4 * half]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_passes_through_unchanged(dtype):
    """Subnormals, infinities and NaN too, through the widening and the rounding."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 256)
    order = torch.arange(x.shape[0])
    for out in (OPS.gather(x, order, 1, torch.ones(x.shape[0], 1)), OPS.weighted_scatter(x, order, 1)):
        torch.testing.assert_close(out, x, rtol=0, atol=0, equal_nan=True)


def test_sums_are_taken_in_order_of_k():
    """2^24 + 1 - 2^24 is 0 in fp32 in this order, and 1 in any other."""
    y = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    assert OPS.weighted_scatter(y, torch.tensor([0, 1, 2]), 3).item() == 0.0
    assert OPS.weighted_scatter(y, torch.tensor([0, 2, 1]), 3).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_arguments(dtype):
    tokens, num_experts, top_k, width = 11, 5, 3, 17
    index = choices(tokens, num_experts, top_k)
    x, y = normal(tokens, width, dtype=dtype), normal(tokens * top_k, width, dtype=dtype, seed=2)
    weights = normal(tokens, top_k, dtype=torch.float32, seed=3)

    def strided(tensor):
        """The same values, every second element of a buffer and with its dimensions stored in reverse."""
        buffer = torch.stack([tensor, tensor], dim=-1).permute(*reversed(range(tensor.dim() + 1))).contiguous()
        view = buffer.permute(*reversed(range(tensor.dim() + 1)))[..., 0]
        return view if tensor.dim() > 1 else torch.stack([tensor, tensor], dim=1)[:, 0]

    order, inverse, _ = permutation = OPS.permute_index(index, num_experts)
    pairs = [
        *zip(OPS.permute_index(strided(index), num_experts), permutation, strict=True),
        (OPS.gather(strided(x), strided(order), top_k, strided(weights)), OPS.gather(x, order, top_k, weights)),
        (
            OPS.weighted_scatter(strided(y), strided(inverse), top_k, strided(weights)),
            OPS.weighted_scatter(y, inverse, top_k, weights),
        ),
        (OPS.row_dot(strided(y), strided(x), strided(inverse), top_k), OPS.row_dot(y, x, inverse, top_k)),
    ]
    assert not any(strided(tensor).is_contiguous() for tensor in (index, x, y, weights, order))
    for got, expected in pairs:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(threads, dtype):
    tokens, num_experts, top_k, width = 12_000, 6, 3, 40  # 36,000 choices: more than two slices of the counting sort
    index = choices(tokens, num_experts, top_k)
    x, y = normal(tokens, width, dtype=dtype), normal(tokens * top_k, width, dtype=dtype, seed=2)
    weights = normal(tokens, top_k, dtype=torch.float32, seed=3)

    def results(count):
        threads(count)
        order, inverse, offsets = OPS.permute_index(index, num_experts)
        gathered = OPS.gather(x, order, top_k, weights)
        combined = OPS.weighted_scatter(y, inverse, top_k, weights)
        return order, inverse, offsets, gathered, combined, OPS.row_dot(y, x, inverse, top_k)

    alone = results(1)
    np.testing.assert_array_equal(alone[0].numpy(), true_order(index))
    for count in (2, 3):
        assert all(torch.equal(got, expected) for got, expected in zip(results(count), alone, strict=True))


def test_zero_width_rows():
    order = torch.arange(6)
    assert OPS.gather(torch.zeros(3, 0), order, 2).shape == (6, 0)
    assert OPS.weighted_scatter(torch.zeros(6, 0), order, 2).shape == (3, 0)
    assert OPS.row_dot(torch.zeros(6, 0), torch.zeros(3, 0), order, 2).tolist() == [[0.0, 0.0]] * 3


# Bad arguments --------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 4)
Y = torch.zeros(6, 4)
FLAT = torch.arange(6)
WEIGHTS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("permute_index", (FLAT, 6), r"`index` with shape \[T, K\].*got \[6\]"),
        ("permute_index", (FLAT.int().reshape(3, 2), 6), "`index` in int64, got int32"),
        ("permute_index", (FLAT.reshape(3, 2), 5), r"entry of `index` in \[0, 5\), got 5 at position 5"),
        ("permute_index", (FLAT.reshape(3, 2) - 1, 6), r"entry of `index` in \[0, 6\), got -1 at position 0"),
        ("permute_index", (FLAT.reshape(3, 2), 0), "`num_experts` from 1 to .* got 0"),
        ("gather", (X[0], FLAT, 2), r"`x` with shape \[T, D\].*got \[4\]"),
        ("gather", (X.long(), FLAT, 2), "`x` in bfloat16, .* got int64"),
        ("gather", (X, FLAT.float(), 2), "`order` in int64, got float32"),
        ("gather", (X, FLAT.reshape(3, 2), 2), r"`order` with shape \[T\*top_k\].*got \[3, 2\]"),
        ("gather", (X, FLAT[:5], 2), r"`order` with T \* top_k rows, T = 3 and top_k = 2, got 5"),
        ("gather", (X, FLAT, 0), "`top_k` from 1 to .* got 0"),
        ("gather", (X, FLAT + 1, 2), r"entry of `order` in \[0, 6\), got 6 at position 5"),
        ("gather", (X, FLAT - 1, 2), r"entry of `order` in \[0, 6\), got -1 at position 0"),
        ("gather", (X, FLAT, 2, WEIGHTS.T), r"`weights` with shape \[T, top_k\] = \[3, 2\], got \[2, 3\]"),
        ("gather", (X, FLAT, 2, WEIGHTS.half()), "`weights` in the dtype of `x`, float32, got float16"),
        ("weighted_scatter", (Y[0], FLAT, 2), r"`y` with shape \[T\*top_k, O\].*got \[4\]"),
        ("weighted_scatter", (X, FLAT, 2), r"`y` with shape \[T\*top_k, O\] = \[6, \*\], got \[3, 4\]"),
        ("weighted_scatter", (Y.bool(), FLAT, 2), "`y` in bfloat16, .* got Bool"),
        ("weighted_scatter", (Y, FLAT, 4), r"`inverse` with T \* top_k rows, T = 1 and top_k = 4, got 6"),
        ("weighted_scatter", (Y, FLAT + 1, 2), r"entry of `inverse` in \[0, 6\), got 6 at position 5"),
        ("weighted_scatter", (Y, FLAT.int(), 2), "`inverse` in int64, got int32"),
        ("weighted_scatter", (Y, FLAT, -1), "`top_k` from 1 to .* got -1"),
        ("weighted_scatter", (Y, FLAT, 2, WEIGHTS[:2]), r"`weights` with shape .* \[3, 2\], got \[2, 2\]"),
        ("weighted_scatter", (Y, FLAT, 2, WEIGHTS.double()), "`weights` in the dtype of `y`, float32, got float64"),
        ("row_dot", (Y[:, :3], X, FLAT, 2), r"`a` with shape \[T\*top_k, O\] = \[6, 4\], got \[6, 3\]"),
        ("row_dot", (Y.double(), X, FLAT, 2), "`a` in the dtype of `b`, float32, got float64"),
        ("row_dot", (Y, X[0], FLAT, 2), r"`b` with shape \[T, O\].*got \[4\]"),
        ("row_dot", (Y.int(), X.int(), FLAT, 2), "`b` in bfloat16, .* got int32"),
        ("row_dot", (Y, X, FLAT[:4], 2), r"`inverse` with T \* top_k rows, T = 3 and top_k = 2, got 4"),
        ("row_dot", (Y, X, FLAT + 1, 2), r"entry of `inverse` in \[0, 6\), got 6 at position 5"),
        ("row_dot", (Y, X, FLAT, 0), "`top_k` from 1 to .* got 0"),
    ],
)
def test_a_bad_argument_is_named(op, arguments, message):
    with pytest.raises(RuntimeError, match=f"libmoe_fast::{op}: expected .*{message}"):
        getattr(OPS, op)(*arguments)


# The extension's account of itself ------------------------------------------------------------------------------------

MARKER = b"libmoe_fast built with torch 2.13.7+test\0"


def test_no_library_in_the_folder(tmp_path):
    assert extension.find(tmp_path) is None


def test_a_package_without_its_library_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    state = extension.load.__wrapped__()
    assert (state.loaded, state.path) == (False, None)
    assert "not built" in state.reason
    assert "g++" in state.hint


def test_a_library_that_does_not_load_names_both_torch_versions(tmp_path):
    path = tmp_path / "_cpu.abi3.so"
    path.write_bytes(b"not a library " + MARKER)
    assert extension.find(tmp_path) == path
    state = extension.load_file(path)
    assert (state.loaded, state.built_with) == (False, "2.13.7+test")
    assert f"built with torch 2.13.7+test, does not load with torch {torch.__version__}" in state.reason
    assert "--no-build-isolation" in state.hint


def test_an_old_torch_is_named_and_its_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    state = extension.load.__wrapped__()
    assert not state.loaded
    assert "needs torch 2.11 or newer, and here is 2.10.1" in state.reason
    assert 'pip install "torch>=2.11"' in state.hint


def test_a_foreign_file_is_told_apart(tmp_path):
    path = tmp_path / "_cpu.abi3.so"
    path.write_bytes(b"something else")
    state = extension.load_file(path)
    assert (state.loaded, state.built_with) == (False, None)
    assert "is not a library of libmoe_fast" in state.reason


def test_a_library_of_older_sources_is_told_apart(monkeypatch):
    monkeypatch.setattr(extension, "OPS", (*extension.OPS, "of_the_future"))
    state = extension.load.__wrapped__()
    assert not state.loaded
    assert "has no op of_the_future" in state.reason
