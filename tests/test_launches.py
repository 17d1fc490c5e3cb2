"""How a kernel is launched, as far as that can be seen without launching one: device, tile, precision."""

import contextlib
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from libmoe_fast import ConfigError
from libmoe_fast.kernels import experts, run
from libmoe_fast.kernels.dispatch import Permuted
from libmoe_fast.kernels.shapes import SHAPES, layer_launches
from libmoe_fast.kernels.tiles import GEMMS, TILES, TUNING_KEYS, Tile, candidates

FLOAT32, BFLOAT16 = torch.empty(1), torch.empty(1, dtype=torch.bfloat16)


@pytest.fixture
def two_gpus(monkeypatch):
    """As if there were two GPUs, cuda:0 the current one. Returns the device that is current."""
    current = [0]

    @contextlib.contextmanager
    def device(wanted):
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(run, "INTERPRETED", False)
    monkeypatch.setattr(run, "_prepared", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return lambda: current[0]


class Kernel:
    """A kernel that Triton would compile on its first launch; writes down how each launch was made."""

    def __init__(self, function, where):
        self.fn, self.arg_names, self.where = function, list(inspect.signature(function).parameters), where
        self.compiled, self.again = [], []

    def __getitem__(self, grid):
        def launch(**args):
            self.compiled.append((self.where(), grid, args))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *values: self.kernel.again.append((self.kernel.where(), grid, values))


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_is_launched_where_its_tensors_are(index, two_gpus):
    """device_map="auto" puts layers on GPUs that are not the current one; Triton launches on the current one."""
    kernel = Kernel(lambda: None, two_gpus)
    for _ in range(2):
        run.run(kernel, (1,), device=torch.device("cuda", index))
    assert [where for where, *_ in kernel.compiled] == [index]
    assert kernel.again == [(index, (1, 1, 1), ())]
    assert two_gpus() == 0


def some_kernel(x_ptr, y_ptr, T, scale, N: tl.constexpr): ...


ALIGNED = torch.empty(100)
SAME = {"x_ptr": ALIGNED, "y_ptr": None, "T": 48, "scale": 0.5, "N": 4, "num_warps": 4}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        pytest.param({}, True, id="same"),
        pytest.param({"T": 64}, True, id="other multiple of 16"),
        pytest.param({"scale": 0.25}, True, id="other number"),
        pytest.param({"x_ptr": torch.empty(7)}, True, id="other tensor"),
        pytest.param({"T": 49}, False, id="no multiple of 16"),
        pytest.param({"T": 1}, False, id="one, a constant to Triton"),
        pytest.param({"T": 2**31}, False, id="beyond 32 bits"),
        pytest.param({"N": 5}, False, id="constant"),
        pytest.param({"num_warps": 8}, False, id="compiler option"),
        pytest.param({"y_ptr": ALIGNED}, False, id="tensor for None"),
        pytest.param({"x_ptr": ALIGNED.half()}, False, id="dtype"),
        pytest.param({"x_ptr": ALIGNED[1:]}, False, id="unaligned"),
    ],
)
def test_a_launch_is_made_again_only_where_triton_would_compile_the_same(change, again, two_gpus):
    kernel = Kernel(some_kernel, two_gpus)
    launch = functools.partial(run.run, kernel, (3, 2), device=torch.device("cuda", 0))
    launch(**SAME)
    launch(**SAME | change)
    assert len(kernel.compiled) == (1 if again else 2)
    if again:
        ((_, grid, values),) = kernel.again
        assert grid == (3, 2, 1)
        assert all(value is (SAME | change)[name] for name, value in zip(kernel.arg_names, values, strict=True))


def some_gemm(
    x_ptr,
    w1,
    H,
    K_MAJOR: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
): ...


@pytest.mark.parametrize("descriptor", [True, False])
def test_a_gemm_is_made_again_with_its_tile_and_the_weight_of_now(descriptor, two_gpus, monkeypatch):
    kernel = Kernel(some_gemm, two_gpus)
    kernel.best_config = SimpleNamespace(kwargs={"BM": 128, "BN": 64, "BK": 32})
    monkeypatch.setattr(run, "_tuned", lambda *_: kernel)
    monkeypatch.setattr(run, "architecture", lambda device: "sm90")
    monkeypatch.setattr(run.Launch, "tiles", lambda *_: ())
    first, second = torch.empty(4, 256, 128), torch.empty(4, 256, 128)
    for weight in (first, second):
        args = {"x_ptr": ALIGNED, "w1": weight, "H": 128, "K_MAJOR": True, "DESCRIPTOR": descriptor}
        run.run(kernel, lambda meta: (meta["BM"],), "up", device=torch.device("cuda", 0), **args)
    ((_, grid, (x, weight, *others)),) = kernel.again
    assert grid == (128, 1, 1)
    assert x is ALIGNED
    assert others == [128, True, descriptor, 128, 64, 32]
    if descriptor:
        assert weight.base is second
        assert weight.block_shape == [1, 64, 32]
        assert list(weight.strides) == [256 * 128, 128, 1]
    else:
        assert weight is second


def test_other_sizes_of_a_gemm_are_tuned_anew(two_gpus):
    """Its integers are the tuner's keys, though 16 divides both."""
    keys = {run.launch_key(Kernel(some_gemm, two_gpus), "down", ALIGNED.device, {"H": H}) for H in (128, 256)}
    assert len(keys) == 2


def test_launches_that_never_come_back_are_forgotten(two_gpus, monkeypatch):
    monkeypatch.setattr(run, "MOST_PREPARED", 3)
    kernel = Kernel(some_kernel, two_gpus)
    for N in range(10):
        run.run(kernel, (1,), device=torch.device("cuda", 0), **SAME | {"N": N})
        assert len(run._prepared) <= 3


@pytest.fixture
def compiled(monkeypatch):
    """As in a process without TRITON_INTERPRET on an sm90; whatever float32 precision is set here is undone."""
    monkeypatch.setattr(experts, "INTERPRETED", False)
    monkeypatch.setattr(experts, "architecture", lambda device: "sm90")
    monkeypatch.delenv(experts.FP32_VARIABLE, raising=False)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "none"  # as in a new process
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        (lambda matmul: None, "tf32x3"),
        (lambda matmul: setattr(matmul, "fp32_precision", "ieee"), "ieee"),
        (lambda matmul: setattr(matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda matmul: setattr(matmul, "allow_tf32", True), "tf32"),
        (lambda matmul: setattr(matmul, "allow_tf32", False), "ieee"),
    ],
    ids=["nothing", "new-ieee", "new-tf32", "old-tf32", "old-ieee"],
)
def test_tf32_only_where_allowed(allow, expected, compiled):
    allow(torch.backends.cuda.matmul)
    assert experts.precision(FLOAT32) == expected
    assert experts.precision(BFLOAT16) == "ieee"


def test_amd_multiplies_float32_as_it_is(compiled, monkeypatch):
    monkeypatch.setattr(experts, "architecture", lambda device: "gfx942")
    assert experts.precision(FLOAT32) == "ieee"


def test_precision_never_reads_the_switch_that_raises(compiled, monkeypatch):
    """torch's allow_tf32 raises once the new switch was set to what the old one cannot say."""

    class Matmul:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert experts.precision(BFLOAT16) == "ieee"
    assert experts.precision(FLOAT32) == "tf32"


@pytest.mark.parametrize(
    ("arch", "asked", "expected"),
    [
        ("sm80", "tf32x3", "tf32x3"),
        ("sm90", "tf32", "tf32"),
        ("sm90", "ieee", "ieee"),
        ("gfx942", "tf32", "tf32"),
        ("gfx942", "tf32x3", "ieee"),  # Triton has it on NVIDIA only; AMD's matrix units take float32 as it is
    ],
)
def test_precision_that_is_asked_for(arch, asked, expected, compiled, monkeypatch):
    """LIBMOE_FAST_FP32 wins over torch's switch."""
    torch.backends.cuda.matmul.fp32_precision = "ieee" if expected == "tf32" else "tf32"
    monkeypatch.setattr(experts, "architecture", lambda device: arch)
    monkeypatch.setenv(experts.FP32_VARIABLE, asked)
    assert experts.precision(FLOAT32) == expected
    assert experts.precision(BFLOAT16) == "ieee"


def test_a_precision_that_does_not_exist(compiled, monkeypatch):
    monkeypatch.setenv(experts.FP32_VARIABLE, "fp64")
    with pytest.raises(ConfigError, match="LIBMOE_FAST_FP32 is 'fp64'; expected one of ieee, tf32x3, tf32"):
        experts.precision(FLOAT32)


@pytest.mark.parametrize("arch", TILES)
def test_every_operand_has_tiles(arch):
    """Also what a user sets by himself."""
    for gemm in GEMMS:
        for itemsize, precision in [(2, "ieee"), (4, "ieee"), (4, "tf32"), (4, "tf32x3")]:
            if (arch, precision) == ("gfx942", "tf32x3"):
                continue
            if (arch, precision) == ("sm90", "tf32") and gemm in ("dw1", "dw2"):  # they are multiplied as tf32x3
                continue
            for lengths, num_experts in [((1024, 4096), 4), ((1024, 4096), 256), ((1000, 4096), 4)]:
                found = candidates(arch, gemm, itemsize, precision, lengths, num_experts)
                assert found, (gemm, itemsize, precision)


def test_a_tile_with_two_programs_fills_each_processor_twice():
    tile = Tile(BM=128, BN=128, BK=64, programs=2)
    grid = experts.persistent(rows=100_000, num_experts=4, columns=4096, device=torch.device("cuda"))
    with run.observing(lambda launch: None, architecture="sm90", programs=132):
        assert grid(tile.sizes) == (264,)
        few = experts.persistent(rows=100, num_experts=4, columns=512, device=torch.device("cuda"))
        assert few(tile.sizes) == ((1 + 3) * 4,)  # a row tile, and one more at each expert's edge, of 4 columns


@pytest.mark.parametrize(("rows", "power"), [(1, 0), (14, 3), (16, 4), (4616, 12), (8191, 12), (8192, 13)])
def test_rows_are_counted_in_powers_of_two(rows, power):
    permuted = Permuted(*(torch.empty(n, dtype=torch.int64) for n in (rows, rows, 5)))
    assert experts.rows_log2(permuted) == power


def test_every_gemm_is_tuned_by_its_rows():
    """A first call with 7 tokens must not fix the tile for 16,384."""
    assert TUNING_KEYS.keys() == set(GEMMS)
    for shape in SHAPES:
        for launch in layer_launches(shape, "sm90"):
            if launch.gemm is not None:
                assert "rows_log2" in TUNING_KEYS[launch.gemm]
                assert launch.args["rows_log2"] == shape.rows.bit_length() - 1
                assert set(TUNING_KEYS[launch.gemm]) <= launch.args.keys() | set(launch.kernel.arg_names)
