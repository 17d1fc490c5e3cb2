"""The CPU expert engine against float64, in both of its ways to multiply: own tiles, and torch's mm."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from libmoe_fast import cpu_backend, extension, fused, ops, reference
from libmoe_fast.spec import Routing

pytestmark = pytest.mark.skipif(not extension.load().loaded, reason="the C++ extension is not built")
lib = torch.ops.libmoe_fast


@pytest.fixture(params=["tiles", "torch"])
def gemm(request, monkeypatch):
    """Tiles where this machine has the instructions; torch's mm everywhere. Both against the same truth."""
    monkeypatch.setenv("LIBMOE_FAST_CPU_GEMM", request.param)


def problem(T, D, H, O, N, K, *, dtype, gated=False, bias=(True, True), skewed=False):
    torch.manual_seed(0)
    index = torch.rand(T, N).argsort(-1)[:, :K]
    if skewed:
        index = torch.arange(K).expand(T, K)  # the first K experts take all
    up = 2 * H if gated else H
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [
        torch.randn(T, D).to(dtype),
        torch.rand(T, K).to(weights_dtype),
        (torch.randn(N, up, D) * D**-0.5).to(dtype),
        (torch.randn(N, up) * 0.1).to(dtype) if bias[0] else None,
        (torch.randn(N, O, H) * H**-0.5).to(dtype),
        (torch.randn(N, O) * 0.1).to(dtype) if bias[1] else None,
    ]
    return index.contiguous(), tensors, torch.randn(T, O).to(dtype)


def engine(x, weights, index, *params, **options):
    return fused.experts(cpu_backend.OPS, x, Routing(index, weights), *params, **options)


def results(experts, index, tensors, dy, **options):
    """y and every gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    x, weights, *params = leaves
    y = experts(x, weights, index, *params, **options)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def oracle(x, weights, index, *params, **options):
    return reference.experts(x, weights, index, *params, **options)


def per_expert(x, weights, index, w1, b1, w2, b2, *, activation, gated):
    """What users run today: a loop of F.linear over the experts, in the tensors' own dtype."""
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=x.dtype)
    for e in range(w1.shape[0]):
        t, k = torch.where(index == e)
        z = torch.nn.functional.linear(x[t], w1[e], None if b1 is None else b1[e])
        out = torch.nn.functional.linear(reference.activate(z, activation, gated), w2[e], None if b2 is None else b2[e])
        y = y.index_add(0, t, out * weights[t, k, None].to(x.dtype))
    return y


SHAPES = {
    "odd sizes, fewer rows than a tile": (23, 5, 6, 3, 4, 2),
    "odd sums and partial tiles": (150, 129, 269, 67, 5, 3),
    "many small experts": (200, 64, 64, 32, 64, 8),
    "K = N": (45, 33, 40, 33, 3, 3),
}
VARIANTS = [
    ("gelu", False, (True, True)),
    ("gelu_pytorch_tanh", False, (True, False)),
    ("relu", False, (False, True)),
    ("silu", True, (True, True)),
    ("quick_gelu", True, (False, False)),
    ("gpt_oss", True, (True, True)),
]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("activation", "gated", "bias"), VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_error_is_pytorchs_own(shape, activation, gated, bias, dtype, gemm):
    """Against float64 on the same rounded inputs: at most twice the error of a per-expert loop of F.linear."""
    index, tensors, dy = problem(*shape, dtype=dtype, gated=gated, bias=bias)
    if activation == "gpt_oss":  # two thirds of the pre-activations are far beyond its limits, none near its kinks
        tensors[3] = (12 * torch.randint(-1, 2, tensors[3].shape)).to(dtype)
    options = {"activation": activation, "gated": gated}
    wide = [None if t is None else t.double() for t in tensors]
    exact = results(per_expert, index, wide, dy.double(), **options)
    theirs = results(per_expert, index, tensors, dy, **options)
    ours = results(engine, index, tensors, dy, **options)
    for position, (a, b, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = ((v.double() - truth).norm() / truth.norm() for v in (a, b))
        assert error <= 2 * allowed + 1e-15, f"result {position}: {error:.2e}, PyTorch's own {allowed:.2e}"


def test_gradients_leave_float16_where_the_reference_does(gemm):
    """Each choice's gradient of x is rounded, then their sum: out of range is where one of these is, not where a sum of
    some of them is, as it happens in a loop over experts.
    """
    options, (T, K) = {"activation": "gelu", "gated": False}, (64, 4)
    index, tensors, dy = problem(T, 100, 400, 100, 8, K, dtype=torch.float16)
    tensors[2] *= 20
    dy *= 2000
    x, weights, *params = (t.double() for t in tensors)
    alone = [x.repeat_interleave(K, 0), weights.reshape(T * K, 1), *params]
    choices = results(per_expert, index.reshape(T * K, 1), alone, dy.double().repeat_interleave(K, 0), **options)[1]
    rounded = torch.cat([choices.view(T, K, -1), choices.view(T, K, -1).sum(1, keepdim=True)], 1).abs()  # [T, K + 1, D]
    most = torch.finfo(torch.float16).max
    out, clear = (rounded > most).any(1), ((rounded / most - 1).abs() > 0.01).all(1)  # else rounding decides
    assert 100 < out.sum() < 1000
    for backend in (engine, oracle):
        dx = results(backend, index, tensors, dy, **options)[1]
        assert torch.equal(~dx.isfinite()[clear], out[clear])
    loop = results(per_expert, index, tensors, dy, **options)[1]
    assert not torch.equal(~loop.isfinite()[clear], out[clear])  # so these numbers can tell


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "gated"),
    [
        ((3000, 20, 40, 24, 3, 1), False),  # an expert's rows in several units (kMostUnitRows)
        ((700, 1500, 2100, 16, 4, 2), False),  # experts in several groups (kGroupBytes)
        ((4000, 20, 310, 24, 3, 1), False),  # hidden columns in several slices (kSliceBytes)
        ((4000, 20, 310, 24, 3, 1), True),
        ((40, 1056, 1120, 1056, 4, 2), False),  # weight gradients past the caches (kCachedBytes), all in whole lines
        ((40, 1040, 1104, 1040, 4, 2), True),  # and not: in bf16 every other row begins within a line
    ],
    ids=["units", "groups", "slices", "gated slices", "streams", "streams off lines"],
)
def test_what_large_sizes_take(shape, gated, dtype, gemm):
    index, tensors, dy = problem(*shape, dtype=dtype, gated=gated, skewed=shape[-1] == 1)
    options = {"activation": "gelu", "gated": gated}
    exact = results(per_expert, index, [t.double() for t in tensors], dy.double(), **options)
    ours = results(engine, index, tensors, dy, **options)
    for a, truth in zip(ours, exact, strict=True):
        assert (a.double() - truth).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [2, 0], ids=["some", "none"])  # that are here, of those chosen
def test_one_row_for_all_choices_that_no_expert_runs(experts, dtype, gemm):
    """As where other processes hold most experts. The same bits as with a row for each of them."""
    index, (x, weights, *params), dy = problem(45, 33, 40, 30, 5, 3, dtype=dtype)
    here = [p[:2] for p in params]
    others = torch.where(index < experts, index, 2)

    def run(x, weights, index, *params, **options):
        return ops.experts(x, Routing(index, weights, free=1), *params, backend="cpu", **options)

    options = {"activation": "gelu", "gated": False}
    whole, counted = (results(run, others, [x, weights, *here], dy, **options, counted=c) for c in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(whole, counted, strict=True))
    assert whole[0].any() == (experts > 0)
    dweights = counted[2]
    assert not dweights[others == 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_run(dtype, gemm):
    index, tensors, dy = problem(500, 96, 200, 80, 4, 2, dtype=dtype)
    first, second = (results(engine, index, tensors, dy, activation="gelu", gated=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def has_tiles(dtype):
    """As in csrc/tile_gemm.cpp. The bits of torch's mm do depend on the number of threads."""
    cpu, allowed = torch.cpu.get_capabilities(), os.environ.get("LIBMOE_FAST_CPU_ISA", "")
    if all(cpu.get(name) for name in ("avx512_f", "avx512_bw", "avx512_vl")) and allowed != "avx2":
        return dtype == torch.float32 or bool(not allowed and cpu["avx512_bf16"])
    return bool(cpu.get("avx2") and cpu.get("fma3"))


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "skewed"),
    [
        ((500, 96, 200, 80, 4, 2), False),
        ((3000, 20, 40, 24, 3, 1), True),  # one expert's rows in several units
        ((700, 1500, 500, 16, 4, 2), False),  # several groups
        ((4000, 20, 310, 24, 3, 1), True),  # several slices
        ((20, 96, 200, 80, 64, 2), False),  # idle experts, and most of the others with a row or two
    ],
    ids=["balanced", "one expert takes all", "groups", "slices", "more experts than choices"],
)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_threads(shape, skewed, gated, dtype, restored_threads, monkeypatch):
    """How work is cut into tasks depends on the number of threads, and who does a task on which thread is free."""
    if not has_tiles(dtype):
        pytest.skip("no tiles for this dtype on this machine")
    monkeypatch.setenv("LIBMOE_FAST_CPU_GEMM", "tiles")
    index, tensors, dy = problem(*shape, dtype=dtype, gated=gated, skewed=skewed)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(engine, index, tensors, dy, activation="gelu", gated=gated))
    for threads, again in enumerate(found[1:], start=2):
        for position, (a, b) in enumerate(zip(found[0], again, strict=True)):
            assert torch.equal(a, b), f"result {position} with {threads} threads"


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations_are_exact_over_their_whole_range(activation, gemm):
    """z itself as input (W1 = I), from the far tails to the middle: the value, and the slope by way of dx."""
    z = torch.cat([torch.linspace(-30, 30, 60_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0])]).view(-1, 1)
    weights, index = torch.ones_like(z), torch.zeros_like(z, dtype=torch.int64)
    one = torch.ones(1, 1, 1)
    tensors = [z, weights, one, None, one, None]
    options = {"activation": activation, "gated": False}
    y, slope, *_ = results(engine, index, tensors, torch.ones_like(z), **options)
    wide = [None if t is None else t.double() for t in tensors]
    value, exact_slope, *_ = results(per_expert, index, wide, torch.ones_like(z).double(), **options)
    assert ((y - value).abs() <= 1e-6 * value.abs() + 1e-9).all()
    assert (slope - exact_slope).abs().max() <= 5e-7


def test_without_gradients_z_is_not_kept(gemm):
    index, (x, weights, *params), _ = problem(40, 16, 24, 16, 4, 2, dtype=torch.float32)
    permutation = lib.permute_index(index, 4)
    y, z = lib.cpu_experts(x, None, weights, *permutation, *params, "gelu", False, False)
    kept_y, kept_z = lib.cpu_experts(x, None, weights, *permutation, *params, "gelu", False, True)
    assert z.shape == (0, 24)
    assert kept_z.shape == (80, 24)
    assert torch.equal(y, kept_y)


def test_frozen_experts_skip_their_gradients(gemm):
    index, (x, weights, *params), dy = problem(40, 16, 24, 16, 4, 2, dtype=torch.float32)
    x.requires_grad_()
    engine(x, weights, index, *params, activation="gelu", gated=False).backward(dy)
    frozen = x.grad
    x.grad = None
    for p in params:
        p.requires_grad_()
    engine(x, weights, index, *params, activation="gelu", gated=False).backward(dy)
    assert torch.equal(frozen, x.grad)
    assert all(p.grad is not None for p in params)


def test_kept_memory_is_never_shared(gemm):
    """Results live on while later calls reuse the memory of results that are gone."""
    index, (x, weights, *params), _ = problem(600, 512, 1024, 512, 2, 1, dtype=torch.float32)
    permutation = lib.permute_index(index, 2)

    def call(scale):
        return lib.cpu_experts(x * scale, None, weights, *permutation, *params, "gelu", False, True)

    alive = [call(scale) for scale in (1.0, 2.0, 3.0)]
    copies = [[t.clone() for t in pair] for pair in alive]
    assert len({t.data_ptr() for t in itertools.chain(*alive)}) == 6
    del alive[1]
    call(4.0)
    for pair, copy in zip(alive, (copies[0], copies[2]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, copy, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, "expected `activation` gelu.*got swish"),
        ({"w1": torch.randn(4, 24, 15)}, r"expected `w1` with shape.*\[\*, \*, 16\], got \[4, 24, 15\]"),
        ({"w2": torch.randn(4, 16, 24).double()}, "expected `w2` in the dtype of `x`, float32, got float64"),
        ({"b1": torch.randn(4, 23)}, r"expected `b1`.*\[4, 24\], got \[4, 23\]"),
        ({"order": torch.full((80,), 80)}, r"every entry of `order` in \[0, 80\), got 80 at position 0"),
        ({"offsets": torch.tensor([0, 50, 40, 60, 80])}, "expected `offsets` to ascend from 0"),
    ],
    ids=["activation", "shape", "dtype", "bias", "index", "offsets"],
)
def test_a_bad_argument_is_named(change, message):
    index, (x, weights, w1, b1, w2, b2), _ = problem(40, 16, 24, 16, 4, 2, dtype=torch.float32)
    order, inverse, offsets = lib.permute_index(index, 4)
    arguments = {"x": x, "rows": None, "weights": weights, "order": order, "inverse": inverse, "offsets": offsets}
    arguments |= {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "activation": "gelu", "gated": False, "store_z": True}
    with pytest.raises(RuntimeError, match=message):
        lib.cpu_experts(**(arguments | change))


@pytest.mark.parametrize("widths", [(0, 8, 8), (8, 0, 8), (8, 8, 0)], ids=str)
def test_a_width_of_zero_is_an_error(widths, gemm):
    D, H, O = widths
    index = torch.tensor([[0, 1]] * 5)
    x, weights, w1, w2 = torch.ones(5, D), torch.ones(5, 2), torch.ones(3, H, D), torch.ones(3, O, H)
    with pytest.raises(RuntimeError, match=f"expected D, H and O of at least 1, got {D}, {H} and {O}"):
        engine(x, weights, index, w1, None, w2, None, activation="gelu", gated=False)


def test_an_unknown_way_to_multiply_is_an_error(monkeypatch):
    monkeypatch.setenv("LIBMOE_FAST_CPU_GEMM", "mkl")
    index, tensors, dy = problem(4, 4, 4, 4, 2, 1, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="LIBMOE_FAST_CPU_GEMM is 'mkl'; expected torch"):
        results(engine, index, tensors, dy, activation="gelu", gated=False)


def test_unknown_instructions_are_an_error():
    """Read once per process, so in one of its own."""
    code = (
        "import torch; from libmoe_fast import MoE; "
        "MoE(64, 64, 64, num_experts=2, top_k=2, backend='cpu')(torch.ones(4, 64))"
    )
    environment = os.environ | {"LIBMOE_FAST_CPU_ISA": "avx1"}
    outcome = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if torch.cpu.get_capabilities().get("avx512_vl"):
        assert "LIBMOE_FAST_CPU_ISA is 'avx1'; expected avx2, avx512" in outcome.stderr
