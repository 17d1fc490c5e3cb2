"""What fake tensors can show without a GPU: no wait for the device anywhere, and the memory that a layer keeps."""

import pytest
import torch
from kernel_checks import DispatchCase, load_kernels
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from libmoe_fast import ROUTERS, MoE, ops
from libmoe_fast.kernels.run import observing

KERNELS = load_kernels()
CLIP_L = {"tokens": (4, 577), "D": 1024, "H": 4096, "N": 4, "K": 2}
FINE_GRAINED = {"tokens": (1, 2304), "D": 2048, "H": 1024, "N": 64, "K": 8}


class OnlyOnTheGpu(TorchDispatchMode):
    """Every tensor that an operation reads or writes is on the GPU: nothing is copied from or to it, nor waits for it.

    Operations whose result depends on values (item, nonzero) fake tensors refuse by themselves.
    """

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == "cuda", f"{function} touches a tensor on {leaf.device}"
                self.seen += 1
        return result


@pytest.fixture
def fake_gpu(monkeypatch):
    """Fake CUDA tensors, which the triton backend takes for real ones."""
    if Version(torch.__version__) < Version("2.11") and not torch.cuda.is_available():
        pytest.skip("before 2.11 torch asks the driver even for fake CUDA tensors, and here is none")
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    monkeypatch.setattr(ops, "_missing", lambda backend: None)
    with FakeTensorMode():
        yield


def run_backward(y: torch.Tensor, grad: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """Leaf -> gradient, node by node: autograd's own engine asks the driver for the tensors' device."""
    arrived = {y.grad_fn: {0: grad}}  # node -> slot -> sum of gradients
    leaves = {}
    for node in nodes_before_their_inputs(y.grad_fn):
        if node not in arrived:
            continue
        if hasattr(node, "variable"):
            leaves[node.variable] = arrived[node][0]
            continue
        grads = [arrived[node].get(slot) for slot in range(len(node._input_metadata))]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            results = [g for g, needed in zip(node.apply(*grads), node.needs_input_grad, strict=True) if needed]
            targets = [target for target in node.next_functions if target[0] is not None]
        else:
            results = node(*grads)
            results = results if isinstance(results, tuple) else (results,)
            targets = node.next_functions
        for (target, slot), result in zip(targets, results, strict=True):
            if target is not None and result is not None:
                meta = target._input_metadata[slot]  # a node leaves it to the engine to sum and cast as that says
                result = result.sum_to_size(meta.shape).to(meta.dtype)
                sums = arrived.setdefault(target, {})
                sums[slot] = sums[slot] + result if slot in sums else result
    return leaves


def nodes_before_their_inputs(root) -> list:
    order, visited, waiting = [], set(), [(root, False)]
    while waiting:
        node, inputs_done = waiting.pop()
        if inputs_done:
            order.append(node)
        elif node not in visited:
            visited.add(node)
            waiting.append((node, True))
            waiting.extend((after, False) for after, _ in node.next_functions if after is not None)
    return order[::-1]


def layer(size: dict, router: str, *, device: str = "cuda", **options) -> MoE:
    return MoE(
        size["D"],
        size["H"],
        size["D"],
        num_experts=size["N"],
        top_k=size["K"],
        router=router,
        device=device,
        dtype=torch.bfloat16,
        **options,
    )


@pytest.mark.parametrize("wait", ["cpu", "item", "nonzero"])
def test_a_wait_would_be_seen(wait, fake_gpu):
    with OnlyOnTheGpu(), pytest.raises((AssertionError, RuntimeError)):  # fake tensors' own errors are RuntimeErrors
        getattr(torch.ones(3, device="cuda").sum(), wait)()


OPTIONS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, options in [
        *((name, {}) for name in ROUTERS),
        ("smoe", {"noise": "learned"}),
        ("cosine", {"learn_temperature": True, "proj_dim": 64}),
        ("sigmoid", {"normalize": "none"}),
    ]
]


@pytest.mark.parametrize(("router", "options"), OPTIONS)
def test_layer_never_waits_for_the_gpu(router, options, fake_gpu):
    """Forward and backward in one dispatch mode, the backend chosen by itself. Kernels that ran would fail."""
    moe = layer(CLIP_L, router, router_options=options)
    x = torch.randn(*CLIP_L["tokens"], CLIP_L["D"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with OnlyOnTheGpu() as gpu:
        y = moe(x)
        leaves = run_backward(y, torch.randn_like(y))
    assert any("libmoe_fast_triton_experts" in node.name() for node in nodes_before_their_inputs(y.grad_fn))
    assert gpu.seen > 50
    assert leaves.keys() == {x, *moe.parameters()}
    assert all(grad.shape == leaf.shape and grad.dtype == leaf.dtype for leaf, grad in leaves.items())


@pytest.mark.parametrize("router", ROUTERS)
def test_layer_on_meta_tensors(router):
    """Through autograd's engine: tensors without values, from which nothing can be read."""
    moe = layer(CLIP_L, router, device="meta", backend="triton")
    x = torch.empty(*CLIP_L["tokens"], CLIP_L["D"], device="meta", dtype=torch.bfloat16, requires_grad=True)
    moe(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in moe.parameters())


@pytest.mark.parametrize("architecture", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_launching_never_waits_for_the_gpu(architecture, gated, fake_gpu):
    """The code around the kernels, which the ops hide from fake tensors: here it runs, its launches are only seen."""
    case = DispatchCase(router={"noise": "learned"}, N=4, K=2, D=256, dtype=torch.bfloat16, tokens=600)
    T, D, H, N = case.tokens, case.D, 1024, case.N

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    names, dispatch, experts = [], KERNELS.dispatch, KERNELS.experts
    coefs = {"spec": case.spec, "temperature": 1.0, "balance_coef": 0.1, "z_coef": 0.1}
    inputs = dispatch.RouterInputs(empty(T, D), empty(N, D), None, empty(T, N, dtype=torch.float32), empty(N, D))
    weights = (empty(N, H * (2 if gated else 1), D), None, empty(N, D, H), empty(N, D))
    with OnlyOnTheGpu(), observing(lambda launch: names.append(launch.name), architecture=architecture):
        routed, permuted, values = dispatch.dispatch(inputs, sequences=2, over_topk=False, **coefs)
        expert = experts.ExpertWeights(*weights, "gelu", gated)
        y, z = experts.experts(inputs.x, routed.weights, permuted, expert, store_z=True)
        grads = experts.experts_backward(y, inputs.x, routed.weights, permuted, expert, z, weight_grads=True)
        dispatch.dispatch_backward(
            inputs,
            routed,
            permuted.inverse,
            values.first_share,
            dweights=grads.dweights,
            dlosses=None,
            aux_scale=empty(dtype=torch.float32),
            dxs=grads.dxs,
            **coefs,
        )
        dispatch.permute(routed.index, N)
    assert len(names) == 5 + 10 + 2


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("size", [CLIP_L, FINE_GRAINED], ids=["CLIP-L", "fine-grained"])
def test_memory_kept_for_backward(size, router, fake_gpu):
    """x, z and the routing, nothing of size [T*K, O]. At CLIP-L that is 2TD + 2TKH bytes and less than 1% more."""
    moe = layer(size, router)
    x = torch.randn(*size["tokens"], size["D"], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    own = {storage_id(tensor) for tensor in moe.state_dict(keep_vars=True).values()}
    kept = {}

    def pack(tensor):
        kept[storage_id(tensor)] = tensor  # also keeps it alive: no id is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = moe(x)
    assert y.requires_grad
    kept_bytes = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    T, D, H, N, K = x.shape[:2].numel(), size["D"], size["H"], size["N"], size["K"]
    least = 2 * T * D + 2 * T * K * H
    allowed = least * 1.01 if size is CLIP_L else least + 36 * T * K + 16 * T * N  # N = 64: the routing is not so small
    assert least <= kept_bytes <= allowed


def storage_id(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
