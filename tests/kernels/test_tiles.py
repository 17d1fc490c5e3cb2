"""Every tile of the table, not only those that the tuner would choose: right, all written, the same bits each time.

At real sizes on a GPU (`make gpu` runs it there); at tiny ones in the interpreter, which has one tile.
"""

import contextlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from dispatch_checks import assert_as_accurate
from kernel_checks import DEVICE, ExpertCase, expert_data, load_kernels, run_experts, torch_experts

from libmoe_fast.kernels.experts import FP32_VARIABLE
from libmoe_fast.kernels.run import choosing
from libmoe_fast.kernels.shapes import CHECKED, Shape

KERNELS = load_kernels()
REPEATS = 20 if DEVICE == "cuda" else 1  # a race shows now and then

TINY = (
    Shape(name="CLIP-L", T=40, D=32, H=128, O=32, N=4, K=2, activation="quick_gelu"),
    Shape(name="SigLIP", T=20, D=36, H=269, O=36, N=4, K=2, activation="gelu_pytorch_tanh"),
    Shape(name="no biases", T=30, D=16, H=24, O=16, N=16, K=4, activation="silu", gated=True, bias=False),
    Shape(name="no multiple of 16", T=21, D=25, H=41, O=25, N=6, K=3),
    Shape(name="gpt-oss", T=16, D=32, H=48, O=32, N=4, K=2, activation="gpt_oss", gated=True),
    Shape(name="decoding", T=3, D=32, H=128, O=32, N=8, K=2),
    Shape(name="free choices", T=40, D=32, H=128, O=32, N=4, K=2, activation="quick_gelu"),
)
# How the choices spread, where not at random.
LOADS = {"decoding": "some idle", "free choices": "some free"}
SIZES = {shape.name: shape for shape in (CHECKED if DEVICE == "cuda" else TINY)}
OPERANDS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32-ieee": (torch.float32, "ieee"),
    "float32-tf32": (torch.float32, "tf32"),  # beside PyTorch's own tf32
    "float32-tf32x3": (torch.float32, "tf32x3"),  # beside PyTorch's full precision: what lets it be the default
}
# cuBLAS rounds float32 to tf32; Triton leaves it to the tensor cores, which cut. A cut operand is too small by 2^-11 of
# its power of two on average, 1 / (2 ln 2) of that of itself, and nothing evens that out. In a gated layer up to eight
# of them are multiplied into one result, the gradient of w1.
TF32_CUT = 8 * 2**-11 / (2 * math.log(2))


@pytest.fixture
def poisoned_memory():
    """Memory that no kernel has written holds NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def pytorch_precision(precision: str):
    """PyTorch's own float32 products, in tf32 only where ours are.

    By the old switch, which sets the new one too: in some versions a product raises where the two differ.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    yield
    torch.backends.cuda.matmul.allow_tf32 = False  # as conftest.py sets it


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_tile(size, operands, poisoned_memory, monkeypatch):
    dtype, precision = OPERANDS[operands]
    if DEVICE == "cpu" and operands in ("float32-tf32", "float32-tf32x3"):
        pytest.skip("the interpreter multiplies float32 as it is")
    if DEVICE == "cpu" and operands != "bfloat16" and size != "decoding":
        pytest.skip("the interpreter has one tile, which test_expert_kernels.py tests in every dtype")
    monkeypatch.setenv(FP32_VARIABLE, precision)
    sizes = {name: getattr(SIZES[size], name) for name in ("T", "D", "H", "O", "N", "K", "activation", "gated")}
    bias = (SIZES[size].bias, SIZES[size].bias)
    assert not failures(ExpertCase(**sizes, bias=bias, load=LOADS.get(size, "random"), dtype=dtype), precision)


def failures(case: ExpertCase, precision: str, run: Callable = run_experts) -> str:
    """What is wrong with the results of `run` on any tile, a line for each; empty if nothing is."""
    data = expert_data(case)
    with pytorch_precision(precision):
        theirs = torch_experts(case, data, None)
    exact = torch_experts(case, data, torch.float64)
    candidates, found = {}, []  # what each GEMM may take is known once it has been asked for

    def choose(gemm, tiles):
        candidates[gemm] = tiles
        return tiles[number % len(tiles)]

    for number in itertools.count():
        with choosing(choose):
            ours = run(KERNELS, case, data)
            again = [run(KERNELS, case, data) for _ in range(REPEATS)]
        names = ", ".join(f"{gemm} {choose(gemm, tiles).name}" for gemm, tiles in candidates.items())
        try:
            assert_as_accurate(ours, theirs, exact, depth=case.depth, cut=TF32_CUT if precision == "tf32" else 0.0)
        except AssertionError as error:
            found.append(f"wrong: {str(error).splitlines()[0]}, with {names}")
        differing = {name for other in again for name in ours if not torch.equal(ours[name], other[name])}
        if differing:
            found.append(f"not the same bits on every run: {', '.join(sorted(differing))}, with {names}")
        if number + 1 >= max(map(len, candidates.values())):
            break
    return "\n".join(found)


def slightly_off(results: dict, run: int) -> None:
    results["dw1"].mul_(1.001)


def left_unwritten(results: dict, run: int) -> None:
    results["dx"][-1, -1] = float("nan")


def racing(results: dict, run: int) -> None:
    if run == REPEATS:  # the last run only
        results["y"][0, 0] = torch.nextafter(results["y"][0, 0], torch.tensor(2.0, device=DEVICE))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (slightly_off, "wrong: dw1"),
        (left_unwritten, "wrong: dx: nan"),
        (racing, "not the same bits on every run: y"),
    ],
)
def test_faults_are_named(fault, message):
    """The check is sharp: results that are a little off, not written or not repeated are found, with their tiles."""
    runs = itertools.count()

    def faulty(*arguments):
        results = run_experts(*arguments)
        fault(results, next(runs) % (REPEATS + 1))
        return results

    found = failures(ExpertCase(T=9), "ieee", faulty)
    assert found.startswith(message)
    assert "up " in found
