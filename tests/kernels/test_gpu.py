"""What only a GPU can show: real sizes, compiled kernels, CUDA graphs, no synchronisation, inductor.

The other files of this folder run on the GPU as well, in a process without TRITON_INTERPRET.
"""

import pytest
import torch
from kernel_checks import DispatchCase, ExpertCase, check_dispatch, check_experts, load_kernels

from libmoe_fast import ROUTERS, MoE, ops

KERNELS = load_kernels()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU"),
    pytest.mark.skipif(ops.interpreted(), reason="TRITON_INTERPRET=1: this process runs the kernels on the CPU"),
]

SHAPES = [
    pytest.param({"T": 2308, "D": 1024, "H": 4096, "O": 1024, "N": 4, "K": 2}, id="CLIP-L"),
    pytest.param({"T": 1024, "D": 1152, "H": 4304, "O": 1152, "N": 4, "K": 2}, id="SigLIP"),
    pytest.param({"T": 1000, "D": 1024, "H": 3072, "O": 3072, "N": 6, "K": 3}, id="projector"),
    pytest.param({"T": 2304, "D": 2048, "H": 1024, "O": 2048, "N": 64, "K": 8}, id="fine-grained"),
    pytest.param({"T": 7, "D": 1024, "H": 4096, "O": 1024, "N": 4, "K": 2}, id="decoding"),  # fewer rows than a tile
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("size", SHAPES)
def test_experts_at_real_sizes(size, gated, dtype):
    check_experts(KERNELS, ExpertCase(**size, gated=gated, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "router",
    [
        pytest.param({}, id="smoe"),
        pytest.param({"noise": "learned"}, id="learned-noise"),
        pytest.param({"score": "cosine", "tau": 0.1, "bias": "selection", "gate": "softmax"}, id="perturbed"),
        pytest.param({"bias": "score", "probability": "softmax_sigmoid"}, id="sigmoid"),
    ],
)
@pytest.mark.parametrize(("N", "K"), [(4, 2), (64, 8), (256, 8)])
def test_dispatch_at_real_sizes(router, N, K, dtype):
    check_dispatch(KERNELS, DispatchCase(router=router, N=N, K=K, tokens=1154, sequences=2, D=1024, dtype=dtype))


def layer(router: str, *, N: int = 4, K: int = 2) -> tuple[MoE, torch.Tensor, torch.Tensor]:
    """A layer, its input and a gradient of its output."""
    torch.manual_seed(0)
    moe = MoE(1024, 4096, 1024, num_experts=N, top_k=K, router=router, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4, 577, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return moe, x, torch.randn_like(x)


def step(moe, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    y = moe(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *moe.parameters()], dy)]


def warm_up(moe, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """The first steps compile and tune; on a stream of their own, as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results = step(moe, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("router", ROUTERS)
def test_chooses_the_triton_backend(router):
    moe, x, _ = layer(router)
    assert ops.choose_backend(None, x.device, x.dtype) == "triton"
    assert moe(x).grad_fn is not None


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("N", "K"), [(4, 2), (64, 8)])
def test_same_bits_every_time(router, N, K):
    moe, x, dy = layer(router, N=N, K=K)
    first = step(moe, x, dy)
    for _ in range(5):
        assert all(map(torch.equal, first, step(moe, x, dy)))


@pytest.mark.parametrize("router", ROUTERS)
def test_no_synchronisation(router):
    moe, x, dy = layer(router)
    warm_up(moe, x, dy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(moe, x, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", ROUTERS)
def test_cuda_graph(router):
    """Forward and backward in one graph; replayed on other tokens, which other experts get."""
    moe, x, dy = layer(router)
    warm_up(moe, x, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(moe, x, dy)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(map(torch.equal, replayed, step(moe, x, dy)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second one captures CUDA graphs by itself
@pytest.mark.parametrize("router", ROUTERS)
def test_inductor(router, mode):
    torch.compiler.reset()
    moe, x, dy = layer(router)
    expected = step(moe, x, dy)
    compiled = torch.compile(moe, fullgraph=True, mode=mode)
    for _ in range(3):  # reduce-overhead captures on a later call
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        actual = [y.detach().clone(), *torch.autograd.grad(y, [x, *moe.parameters()], dy)]
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_layer_beyond_two_to_the_31():
    """T*K*H past what 32 bits address; the last tokens against the same tokens alone."""
    T, D, H, N, K = 300_000, 64, 4096, 4, 2
    assert T * K * H > 2**31
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    torch.manual_seed(0)
    moe = MoE(D, H, D, num_experts=N, top_k=K, device="cuda", dtype=torch.bfloat16, aux_mode="off")
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = moe(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    tail = x[-100:].detach().requires_grad_()
    y_tail = moe(tail)
    (dx_tail,) = torch.autograd.grad(y_tail, tail, torch.ones_like(y_tail))
    torch.testing.assert_close(y[-100:], y_tail, rtol=0.02, atol=0.01)
    torch.testing.assert_close(dx[-100:], dx_tail, rtol=0.02, atol=0.01)
