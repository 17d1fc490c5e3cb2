"""The CUDA part of the extension: its kernels in an emulation on the CPU, its build, and its ops on a GPU.

cuda_emulation/ runs the very .cu files under address and undefined-behaviour sanitizer, in several thread orders. It
shows wrong results, accesses out of bounds and missing barriers, not what only a GPU has: its memory model between
blocks, its speed.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from libmoe_fast import extension

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc" / "cuda"
EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
KERNELS = ("permute", "rows")
ORDERS = ("forward", "backward", "shuffled")
OPS = torch.ops.libmoe_fast

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the emulation")

# The emulation -------------------------------------------------------------------------------------------------------


def compile_emulated(source: Path, target: Path) -> Path:
    headers = Path(torch.__file__).parent / "include"
    options = ("-std=c++20", "-O0", "-g", "-Wno-unknown-pragmas", "-ffp-contract=off", "-x", "c++", "-c")
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    includes = (f"-I{EMULATION}", f"-I{headers}", f"-I{CSRC}")  # the emulation's cuda_runtime.h comes first
    command = ["g++", *options, *sanitizers, *includes, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def link_emulated(objects: list[Path], target: Path) -> Path:
    subprocess.run(["g++", "-fsanitize=address,undefined", *map(str, objects), "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """The compiled kernels, and the program that checks them."""
    folder = tmp_path_factory.mktemp("emulation")
    sources = {kernel: CSRC / f"{kernel}.cu" for kernel in KERNELS} | {"check": EMULATION / "check_kernels.cpp"}
    with ThreadPoolExecutor(2) as pool:
        targets = pool.map(lambda name: compile_emulated(sources[name], folder / f"{name}.o"), sources)
        return dict(zip(sources, targets, strict=True))


@pytest.fixture(scope="module")
def program(objects, tmp_path_factory) -> Path:
    return link_emulated(list(objects.values()), tmp_path_factory.mktemp("emulation") / "check_kernels")


def run(program: Path, kernel: str, order: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LIBMOE_FAST_THREAD_ORDER": order}
    return subprocess.run([program, kernel], capture_output=True, text=True, env=environment, timeout=900)


def mutated(objects, kernel: str, before: str, after: str, folder: Path) -> Path:
    """The program with a fault put into `kernel`: the one place that reads `before` reads `after`."""
    shutil.copytree(CSRC, folder / "csrc")
    files = [path for path in (folder / "csrc").glob(f"{kernel}.cu*") if before in path.read_text()]
    assert len(files) == 1, f"{before!r} is no longer in exactly one file of {kernel}"
    text = files[0].read_text()
    assert text.count(before) == 1
    files[0].write_text(text.replace(before, after))
    faulty = compile_emulated(folder / "csrc" / f"{kernel}.cu", folder / "faulty.o")
    return link_emulated([*(objects[name] for name in objects if name != kernel), faulty], folder / "check_faulty")


@compiler
@pytest.mark.parametrize("kernel", KERNELS)
def test_emulated_kernels_are_right_in_every_thread_order(program, kernel):
    runs = [run(program, kernel, order) for order in ORDERS]
    assert [done.returncode for done in runs] == [0] * len(ORDERS), runs[0].stderr + runs[1].stderr + runs[2].stderr
    checksums = [done.stdout for done in runs]
    assert checksums[0].count("\n") > 10
    assert checksums == checksums[:1] * len(ORDERS), "the bits of a result depend on the order of the threads"


@compiler
def test_slices_of_several_tiles(objects, tmp_path):
    """As for millions of choices: only the bound on the number of slices is made small."""
    program = mutated(objects, "permute", "kMaxSlices = 1024", "kMaxSlices = 2", tmp_path)
    for order in ORDERS:
        done = run(program, "permute", order)
        assert done.returncode == 0, done.stderr


FAULTS = [
    pytest.param(
        "permute",
        "inverse[i] = position;",
        "inverse[i + 1] = position;",
        "heap-buffer-overflow",
        id="write-past-the-end",
    ),
    pytest.param(
        "permute",
        "static_cast<int>(expert) : num_experts;",
        "static_cast<int>(expert) : static_cast<int>(expert);",
        "AddressSanitizer",
        id="experts-that-do-not-exist-unchecked",
    ),
    pytest.param(
        "permute",
        "(kWarps + 1) * buckets * sizeof(int)",
        "kWarps * buckets * sizeof(int)",
        "use-after-poison",
        id="too-little-shared-memory",
    ),
    pytest.param(
        "rows",
        "static_cast<uint64_t>(asked) >=",
        "false &&",
        "AddressSanitizer",
        id="places-that-do-not-exist-unchecked",
    ),
    pytest.param(
        "rows",
        "(reinterpret_cast<uintptr_t>(pointers) | ...)",
        "0 * sizeof...(pointers)",
        "misaligned address",
        id="unaligned-loads",
    ),
]


@compiler
@pytest.mark.parametrize(("kernel", "before", "after", "report"), FAULTS)
def test_the_emulation_catches(objects, tmp_path, kernel, before, after, report):
    done = run(mutated(objects, kernel, before, after, tmp_path), kernel, "forward")
    assert done.returncode != 0
    assert report in done.stderr
    assert f"{kernel}.cuh" in done.stderr or f"{kernel}.cu" in done.stderr  # and says where


BARRIERS = [
    pytest.param(
        "      rank[item] = already + before;\n      __syncwarp();\n",
        "      rank[item] = already + before;\n",
        id="of-a-warp",
    ),
    pytest.param(
        "      seen_by_tile[bucket] = before;\n    }\n    __syncthreads();\n",
        "      seen_by_tile[bucket] = before;\n    }\n",
        id="of-a-block",
    ),
]


@compiler
@pytest.mark.parametrize(("before", "after"), BARRIERS)
def test_a_missing_barrier_shows_in_some_thread_order(objects, tmp_path, before, after):
    program = mutated(objects, "permute", before, after, tmp_path)
    assert any(run(program, "permute", order).returncode != 0 for order in ORDERS)


def on_cuda(op: str, *arguments):
    """Calls the CUDA implementation of an op, whatever its arguments are: enough to reach its checks without a GPU."""
    return getattr(OPS, op).default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


@pytest.mark.skipif(not extension.load_cuda().loaded, reason=str(extension.load_cuda().reason))
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        pytest.param("permute_index", (torch.zeros(3, 2).int(), 4), "`index` in int64, got int32", id="dtype"),
        pytest.param("permute_index", (torch.zeros(3, 2).long(), 1025), "`num_experts` from 1 to 1024", id="experts"),
        pytest.param("gather", (torch.zeros(3, 8), torch.arange(5), 2), "`order` with T [*] top_k rows", id="rows"),
        pytest.param("gather", (torch.zeros(3, 8).int(), torch.arange(6), 2), "`x` in bfloat16, ", id="integers"),
        pytest.param(
            "weighted_scatter",
            (torch.zeros(3, 8), torch.arange(6), 2),
            r"`y` with shape \[T[*]top_k, O\] = \[6, [*]\], got \[3, 8\]",
            id="one-row-per-token",
        ),
        pytest.param(
            "row_dot", (torch.zeros(6, 8), torch.zeros(3, 9), torch.arange(6), 2), "`a` with shape", id="widths"
        ),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_launched(op, arguments, message):
    with pytest.raises(RuntimeError, match=f"libmoe_fast::{op}: expected {message}"):
        on_cuda(op, *arguments)


# The build -----------------------------------------------------------------------------------------------------------


def toolkit():
    """The CUDA toolkit, or the reason why there is none."""
    sys.path.insert(0, str(CSRC))
    try:
        import cuda_toolkit
    finally:
        sys.path.remove(str(CSRC))
    try:
        return cuda_toolkit.find(Path(torch.__file__).parents[1] / "nvidia", torch.version.cuda), None
    except cuda_toolkit.ToolkitError as error:
        return None, str(error)


def prepare_build(**environment: str) -> subprocess.CompletedProcess:
    """What setup.py decides about the build; --help then stops it before the compiler runs."""
    command = [sys.executable, "setup.py", "build_ext", "--help"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def library() -> Path:
    """The CUDA part that the install built; it has to be there wherever a toolkit is."""
    found, reason = toolkit()
    if found is None:
        pytest.skip(reason)
    if os.environ.get("LIBMOE_FAST_CUDA") == "0":
        pytest.skip("LIBMOE_FAST_CUDA=0 leaves the CUDA part out")
    path = extension.load_cuda().path
    assert path is not None, f"there is a CUDA toolkit in {found.home}, but no CUDA part; install libmoe_fast again"
    return Path(path)


def test_the_library_loads_beside_any_torch(library):
    """It needs nothing of CUDA's libraries, and of torch only the C functions of the stable ABI."""
    assert extension.read_built_with(library)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"NEEDED.*\[(?:libcuda|libtorch_cuda|libc10_cuda|libtorch_python)[^]]*\]", needed)
    symbols = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert "[libtorch.so]" in needed  # which brings that function in
    assert not re.findall(r"\b_Z\w*?(?:2at|3c10|5torch)\w*", symbols)


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100"])
def test_every_kernel_is_compiled_without_spills(library, arch):
    cuda_library = pytest.importorskip("libmoe_fast.kernels.cuda_library")  # without triton there are no tools to look
    kernels = cuda_library.read(library, arch)
    dtypes = [f"{dtype} x{16 // size}" for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4), ("fp64", 8))]
    variants = sorted(dtypes + [f"{dtype} x1" for dtype in ("bf16", "fp16", "fp32", "fp64")])
    rows = [(name, variant) for name in ("combine_rows", "dot_rows", "gather_rows") for variant in variants]
    permutation = [(name, "") for name in ("count_choices", "place_choices", "sum_slices")]
    assert [(kernel.name, kernel.variant) for kernel in kernels] == sorted(rows + permutation)
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= 128, kernel  # two blocks of 256 threads per multiprocessor
        assert kernel.shared <= 48 * 1024, kernel  # what a launch gets without asking for more


def test_without_a_toolkit_the_rest_is_built(tmp_path):
    done = prepare_build(LIBMOE_FAST_CUDA="", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    reason = f"CUDA_HOME is {tmp_path}, but there is no {tmp_path}/bin/nvcc"
    assert done.stderr.count(f"libmoe_fast: the CUDA part is left out: {reason}.\n") == 1


def test_forbidding_cuda_does_not_even_look(tmp_path):
    done = prepare_build(LIBMOE_FAST_CUDA="0", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0
    assert "CUDA part" not in done.stderr


def test_demanding_cuda_without_a_toolkit_is_one_clear_error(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal error: out of order'\nexit 1\n")
    nvcc.chmod(0o755)
    done = prepare_build(LIBMOE_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert f"the CUDA part is left out: {nvcc} does not work: nvcc fatal error: out of order" in done.stderr
    assert "LIBMOE_FAST_CUDA=0" in done.stderr


def test_a_misspelt_choice_is_an_error():
    done = prepare_build(LIBMOE_FAST_CUDA="yes")
    assert done.returncode == 1
    assert "LIBMOE_FAST_CUDA is 'yes'; expected 0, 1 or nothing" in done.stderr


def test_the_toolkit_behind_a_script(tmp_path, monkeypatch):
    found, reason = toolkit()
    if found is None:
        pytest.skip(reason)
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{found.home}/bin/nvcc" "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # as a guess from the script's place gets it wrong
    assert toolkit()[0].home == found.home


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path, monkeypatch) -> Path:
    """A folder where only a CUDA part lies that cannot be loaded."""
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    library = tmp_path / "_cuda.abi3.so"
    library.write_bytes(b"libmoe_fast built with torch 2.13.0\0")
    return library


def test_no_cuda_part_says_how_to_get_it(built):
    built.unlink()
    state = extension.load_cuda.__wrapped__()
    assert (state.loaded, state.path) == (False, None)
    assert "was not built" in state.reason
    assert "LIBMOE_FAST_CUDA=1" in state.hint


def test_a_torch_without_cuda_never_loads_it(built, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    state = extension.load_cuda.__wrapped__()
    assert (state.loaded, state.path) == (False, str(built))
    assert state.reason == f"torch {torch.__version__} is built without CUDA"


def test_the_cpu_part_comes_first(built, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(extension, "load", lambda: extension.ExtensionState(loaded=False, reason="R", hint="H"))
    state = extension.load_cuda.__wrapped__()
    assert not state.loaded
    assert state.reason.endswith(": R")
    assert state.hint == "H"


def test_a_damaged_cuda_part_is_a_reason_not_an_exception(built, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    state = extension.load_cuda.__wrapped__()
    assert not state.loaded
    assert "built with torch 2.13.0, does not load with torch" in state.reason


# On a GPU ------------------------------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(not extension.load_cuda().loaded, reason=str(extension.load_cuda().reason)),
]


def on_gpu(function):
    for mark in gpu:
        function = mark(function)
    return function


def problem(tokens, num_experts, top_k, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    y = torch.randn(tokens * top_k, width, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    return index, x, y, weights.double() if dtype == torch.float64 else weights


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "width"),
    [
        pytest.param(0, 4, 2, 8, id="no-tokens"),
        pytest.param(1154, 4, 2, 1024, id="CLIP-L"),
        pytest.param(77, 6, 3, 1151, id="unaligned-rows"),
        pytest.param(2304, 64, 8, 256, id="many-experts"),
        pytest.param(700_000, 1024, 2, 8, id="slices-of-several-tiles"),
    ],
)
def test_cuda_ops_give_the_bits_of_the_cpu_ops(tokens, num_experts, top_k, width, dtype):
    index, x, y, weights = problem(tokens, num_experts, top_k, width, dtype)
    permutation = OPS.permute_index(index, num_experts)
    order, inverse, _ = permutation
    for here, there in zip(permutation, OPS.permute_index(index.cuda(), num_experts), strict=True):
        assert torch.equal(there.cpu(), here)
    for w in (None, weights):
        device_w = None if w is None else w.cuda()
        gathered = OPS.gather(x.cuda(), order.cuda(), top_k, device_w)
        assert torch.equal(gathered.cpu(), OPS.gather(x, order, top_k, w))
        combined = OPS.weighted_scatter(y.cuda(), inverse.cuda(), top_k, device_w)
        assert torch.equal(combined.cpu(), OPS.weighted_scatter(y, inverse, top_k, w))
    dots = OPS.row_dot(y.cuda(), x.cuda(), inverse.cuda(), top_k)  # summed in another order
    torch.testing.assert_close(dots.cpu(), OPS.row_dot(y, x, inverse, top_k))


@on_gpu
def test_ops_are_captured_in_a_cuda_graph_and_follow_the_stream():
    index, x, _, weights = (tensor.cuda() for tensor in problem(600, 8, 2, 64, torch.bfloat16))

    def step():
        order, inverse, offsets = OPS.permute_index(index, 8)
        gathered = OPS.gather(x, order, 2, weights)
        return offsets, OPS.weighted_scatter(gathered, inverse, 2), OPS.row_dot(gathered, x, inverse, 2)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    index.copy_(7 - index)
    x.mul_(2)
    graph.replay()
    for replayed, direct in zip(captured, step(), strict=True):
        assert torch.equal(replayed, direct)


@on_gpu
def test_arguments_on_another_device_are_named():
    _, x, y, weights = problem(4, 4, 2, 8, torch.float32)
    order = torch.arange(8).cuda()
    with pytest.raises(RuntimeError, match="gather: expected `order` on cuda:0, got a tensor on the CPU"):
        OPS.gather(x.cuda(), order.cpu(), 2)
    with pytest.raises(RuntimeError, match="weighted_scatter: expected `weights` on cuda:0, got a tensor on the CPU"):
        OPS.weighted_scatter(y.cuda(), order, 2, weights)
    with pytest.raises(RuntimeError, match=r"expected `weights` with shape \[T, top_k\] = \[4, 2\], got \[2, 4\]"):
        OPS.weighted_scatter(y.cuda(), order, 2, weights.cuda().T)


@on_gpu
def test_what_does_not_exist_is_never_read():
    order, inverse, offsets = OPS.permute_index(torch.tensor([[0, 9], [-1, 1]]).cuda(), 2)
    assert order.tolist() == [0, 3, 1, 2]
    assert inverse.tolist() == [0, 2, 3, 1]
    assert offsets.tolist() == [0, 1, 2]
    out = OPS.gather(torch.ones(2, 8).cuda(), torch.tensor([0, 1, 4, -1]).cuda(), 2)
    assert out.isnan().all(1).tolist() == [False, False, True, True]
