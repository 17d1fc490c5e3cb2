"""How a kernel is launched, as far as that can be seen without launching one: device, tile, precision."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from libmoe_fast.kernels import experts, run
from libmoe_fast.kernels.dispatch import Permuted
from libmoe_fast.kernels.shapes import SHAPES, layer_launches
from libmoe_fast.kernels.tiles import GEMMS, TUNING_KEYS


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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    return lambda: current[0]


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_is_launched_where_its_tensors_are(index, two_gpus):
    """device_map="auto" puts layers on GPUs that are not the current one; Triton launches on the current one."""
    launched_on = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **args: launched_on.append(two_gpus())

    run.run(Kernel(), (1,), device=torch.device("cuda", index))
    assert launched_on == [index]
    assert two_gpus() == 0


@pytest.fixture
def compiled(monkeypatch):
    """As in a process without TRITON_INTERPRET; whatever float32 precision is set here is undone."""
    monkeypatch.setattr(experts, "INTERPRETED", False)
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        (lambda matmul: setattr(matmul, "fp32_precision", "ieee"), "ieee"),
        (lambda matmul: setattr(matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda matmul: setattr(matmul, "allow_tf32", True), "tf32"),
        (lambda matmul: setattr(matmul, "allow_tf32", False), "ieee"),
    ],
    ids=["new-ieee", "new-tf32", "old-tf32", "old-ieee"],
)
def test_tf32_only_where_allowed(allow, expected, compiled):
    allow(torch.backends.cuda.matmul)
    assert experts.precision(torch.float32) == expected
    assert experts.precision(torch.bfloat16) == "ieee"


def test_precision_never_reads_the_switch_that_raises(compiled, monkeypatch):
    """torch's allow_tf32 raises once the new switch was set to what the old one cannot say."""

    class Matmul:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul())
    assert experts.precision(torch.bfloat16) == "ieee"
    assert experts.precision(torch.float32) == "tf32"


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
