"""The whole layer on the triton backend: against the dense MLP, the reference backend, and its own promises."""

import copy
import dataclasses

import pytest
import torch
from kernel_checks import DEVICE, assert_as_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

from libmoe_fast import BackendError, MoE, record_routing, reference
from libmoe_fast.kernels.run import observing
from libmoe_fast.routers import COMPARED
from libmoe_fast.spec import Routing

EVERY_ROUTER = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, options in [
        ("smoe", {}),
        ("smoe", {"noise": "gaussian", "noise_std": 0.5}),
        ("smoe", {"noise": "learned"}),
        ("cosine", {}),
        ("cosine", {"temperature": 0.3, "learn_temperature": True}),
        ("cosine", {"proj_dim": 10}),  # routing sees other tokens than the experts: the sum over K runs by itself
        ("perturbed_cosine", {}),
        ("sigmoid", {}),
        ("sigmoid", {"normalize": "sum"}),
        ("sigmoid", {"normalize": "none"}),
        ("hyper", {}),
    ]
]
FORWARD = ["route", "permute", "up", "down", "combine"]
BACKWARD = [
    "expand",
    "back",
    "dz",
    "weight_grad",
    "expand",
    "weight_grad",
    "back",
    "route_backward",
    "router_grad",
    "router_reduce",
]


def make(router="smoe", options=None, *, dtype=torch.float32, **more) -> MoE:
    """A layer whose every parameter matters: nothing is zero, and the losses are not small."""
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "top_k": 3, "balance_coef": 0.3, "z_coef": 0.2, "backend": "triton"} | more
    moe = MoE(24, 40, 20, router=router, router_options=options, device=DEVICE, **sizes)
    for parameter in moe.router.parameters():
        if parameter.ndim > 0:
            nn.init.normal_(parameter, std=0.3)
    return moe.to(dtype)


def tokens(*shape: int, dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 20, 24))).to(DEVICE, dtype)


def step(moe: MoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One training step with the same noise each time: y, the losses, and the gradient of everything."""
    moe.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    y = moe(x)
    (y.double().square().sum() / 4).backward()
    grads = {f"d {name}": p.grad for name, p in moe.named_parameters() if p.grad is not None}
    logged = {"aux_loss": moe.aux_loss, "balance_loss": moe.balance_loss, "z_loss": moe.z_loss}
    return {"y": y.detach(), "dx": x.grad, **grads, **{k: v for k, v in logged.items() if v is not None}}


def on(backend: str, moe: MoE) -> MoE:
    other = copy.deepcopy(moe)
    other.backend = backend
    return other


def assert_same_step(actual: dict, expected: dict) -> None:
    """Equal up to the order of float32 sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Against the dense MLP, and against the reference backend


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize(
    ("router", "options"),
    [p for p in EVERY_ROUTER if p.id != "sigmoid-none"],  # its weights do not sum to 1
)
def test_upcycled_equals_dense(router, options, num_experts, top_k):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 20)).to(DEVICE)
    moe = MoE.from_dense(
        mlp, router=router, router_options=options, num_experts=num_experts, top_k=top_k, backend="triton"
    )
    x = tokens(2, 9, 24)
    assert (moe(x) - mlp(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("router", "options"), EVERY_ROUTER)
def test_error_is_the_reference_backends_own(router, options, dtype):
    """Through the layer, against float64: output, losses, and the gradients of x and of every parameter."""
    moe, x = make(router, options, dtype=dtype), tokens(dtype=dtype)
    ours, theirs = step(moe, x), step(on("reference", moe), x)
    exact = {name: value.double() for name, value in step(on("reference", moe).double(), x.double()).items()}
    assert len(ours) >= 6 + len(list(moe.router.parameters()))
    assert_as_accurate(ours, theirs, exact)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"activation": "silu", "gated": True, "bias": False}, id="swiglu"),
        pytest.param({"bias": (True, False)}, id="first-bias"),
        pytest.param({"balance_over": "topk", "balance_scope": "batch"}, id="balance"),
        pytest.param({"num_experts": 2, "top_k": 2}, id="dense-use"),
        pytest.param({"aux_mode": "off"}, id="no-aux"),
    ],
)
def test_options_of_the_layer(options):
    moe, x = make(**options), tokens()
    assert_same_step(step(moe, x), step(on("reference", moe), x))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(lambda: tokens(24, 30).t(), id="transposed"),
        pytest.param(lambda: tokens(5, 48)[:, ::2], id="strided"),
        pytest.param(lambda: tokens(1, 24).expand(7, 24), id="expanded"),
        pytest.param(lambda: tokens(4, 6, 24).transpose(0, 1), id="batch-second"),
        pytest.param(lambda: tokens(24)[None], id="one-token"),
        pytest.param(lambda: tokens(24), id="no-batch"),
    ],
)
def test_layouts_of_x(x):
    moe = make("cosine")
    assert_same_step(step(moe, x()), step(on("reference", moe), x()))


def test_gradient_without_memory_of_its_own():
    """y.sum() sends an expanded scalar back."""
    moe, grads = make(), []
    for layer in (moe, on("reference", moe)):
        x = tokens().requires_grad_()
        layer(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_weights_that_are_not_contiguous():
    moe = make()
    for name in ("w1", "w2"):
        weight = getattr(moe.experts, name)
        weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    assert not moe.experts.w1.is_contiguous()
    assert_same_step(step(moe, tokens()), step(on("reference", moe), tokens()))


def test_no_tokens():
    moe = make()
    x = torch.empty(2, 0, 24, device=DEVICE, requires_grad=True)
    y = moe(x)
    y.sum().backward()
    assert y.shape == (2, 0, 20)
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, below the interpreter
@pytest.mark.parametrize("router", COMPARED)  # those of v2 are made of what these launch
def test_a_nan_token_spoils_no_other(router):
    moe, x = make(router).eval(), tokens(40, 24)
    clean = moe(x)
    x[11] = float("nan")
    y = moe(x)
    assert y[11].isnan().all()
    others = torch.arange(40, device=DEVICE) != 11
    torch.testing.assert_close(y[others], clean[others])


def test_hyper_schedule():
    moe, x = make("hyper"), tokens()
    moe.router.set_progress(0, 10)
    with record_routing(moe) as recorder:
        assert_same_step(step(moe, x), step(on("reference", moe), x))
    assert recorder.records[""][0].index.shape == (2, 20, 1)


def test_float64_is_refused():
    moe = make().double()
    with pytest.raises(BackendError, match="takes bfloat16, float16, float32, but"):
        moe(tokens().double())


# ---------------------------------------------------------------------------------------------------------------------
# The auxiliary loss


def gradients(moe: MoE) -> list[torch.Tensor]:
    return [p.grad.clone() for p in moe.parameters()]


@pytest.mark.parametrize("router", ["smoe", "sigmoid"])  # sigmoid's losses are of other probabilities and logits
def test_attached_aux_loss_equals_returned(router):
    attached, returned = make(router), make(router, aux_mode="return")
    attached(tokens()).square().mean().backward()
    y, aux_loss = returned(tokens())
    (y.square().mean() + aux_loss).backward()
    torch.testing.assert_close(gradients(attached), gradients(returned))
    torch.testing.assert_close(attached.aux_loss, aux_loss.detach())
    torch.testing.assert_close(attached.aux_loss, 0.3 * attached.balance_loss + 0.2 * attached.z_loss)
    without = make(router, aux_mode="off")
    without(tokens()).square().mean().backward()
    assert (without.router.weight.grad - attached.router.weight.grad).norm() > 0.01 * attached.router.weight.grad.norm()


@pytest.mark.parametrize("loss", [1, 2], ids=["balance", "z"])
def test_returned_losses_can_be_weighed_anew(loss):
    """Only the sum has a gradient; the parts are for logging."""
    moe = make(aux_mode="return")
    _, aux_loss = moe(tokens())
    assert aux_loss.requires_grad
    assert not (moe.aux_loss, moe.balance_loss, moe.z_loss)[loss].requires_grad


@pytest.mark.parametrize("factor", [1 / 4, 65536.0], ids=["accumulation", "fp16-scale"])
def test_aux_loss_takes_the_scale_of_the_loss(factor):
    attached, returned = make(), make(aux_mode="return")
    (attached(tokens()).square().mean() * factor).backward()
    y, aux_loss = returned(tokens())
    ((y.square().mean() + aux_loss) * factor).backward()
    torch.testing.assert_close(gradients(attached), gradients(returned))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("router", ["smoe", "cosine"])
def test_activation_checkpointing(router, use_reentrant):
    checkpointed, plain = make(router), make(router)
    loss = checkpoint(checkpointed, tokens().requires_grad_(), use_reentrant=use_reentrant).square().mean()
    (loss / 2).backward()
    (plain(tokens().requires_grad_()).square().mean() / 2).backward()
    assert all(map(torch.equal, gradients(checkpointed), gradients(plain)))


def test_share_of_the_choices():
    moe = make()
    with record_routing(moe) as recorder:
        moe(tokens())
    (record,) = recorder.records[""]
    assert torch.equal(moe.last_expert_share, record.index.flatten().bincount(minlength=6) / record.index.numel())
    assert [tuple(t.shape) for t in record[:4]] == [(2, 20, 3), (2, 20, 3), (2, 20, 6), (2, 20, 6)]


# ---------------------------------------------------------------------------------------------------------------------
# Routers and callers that do things their own way


class OwnRouter(nn.Module):
    """Chooses in plain PyTorch: its routing brings no dispatch."""

    def __init__(self, router, dtype=torch.float32):
        super().__init__()
        self.spec, self.dtype = dataclasses.replace(router.spec, aux=False), dtype
        self.weight = nn.Parameter(router.weight.detach().clone())

    def forward(self, x, **_context):
        routing = reference.route(x, self.weight, spec=self.spec)
        return Routing(routing.index, routing.weights.to(self.dtype), routing.probs, routing.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_without_dispatch(dtype):
    """Its weights may be of another dtype, and its index is not contiguous."""
    moe, names = make(), []
    moe.router = OwnRouter(moe.router, dtype)
    with observing(lambda launch: names.append(launch.name)):
        ours = step(moe, tokens())
    assert names[:5] == ["count", "permute", "up", "down", "combine"]
    assert names[5:] == [*BACKWARD[:7], "combine"]
    expected = step(on("reference", moe), tokens())
    torch.testing.assert_close(ours, expected, rtol=1e-4 if dtype is torch.float32 else 0.02, atol=1e-4)


def test_router_under_no_grad():
    """Frozen by its caller: no gradient flows through the choice, and all of the experts' reaches x."""
    moe = make(aux_mode="off")
    forward = moe.router.forward
    moe.router.forward = torch.no_grad()(forward)
    ours = step(moe, tokens())
    reference_moe = make(aux_mode="off", backend="reference")
    reference_moe.router.forward = torch.no_grad()(reference_moe.router.forward)
    assert_same_step(ours, step(reference_moe, tokens()))
    assert "d router.weight" not in ours


def test_noise_that_is_not_contiguous():
    """ops.route is public to router classes, which may draw their noise as they like."""
    from libmoe_fast import ops

    router, x = make("smoe", {"noise": "learned"}).router, tokens(40, 24)
    noise, noise_weight = tokens(6, 40).t(), tokens(24, 6).t()
    routings = [
        ops.route(x, router.weight, spec=router.spec, noise=noise, noise_weight=noise_weight, backend=backend)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(routings[0].probs, routings[1].probs)


def test_routing_used_by_two_expert_layers():
    """One choice, two sets of experts: both gradients reach x and the gate."""
    moe, second = make(aux_mode="off"), make(aux_mode="off").experts
    nn.init.normal_(second.w2, std=0.3)
    grads = []
    for backend in ("triton", "reference"):
        x = tokens(40, 24).requires_grad_()
        routing = moe.router(x, backend=backend)
        y = moe.experts(x, routing, backend) + second(x, routing, backend)
        grads.append(torch.autograd.grad(y.square().sum(), [x, moe.router.weight, second.w1]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_frozen_experts_train_the_router():
    moe, names = make(), []
    moe.experts.requires_grad_(False)
    with observing(lambda launch: names.append(launch.name)):
        ours = step(moe, tokens())
    assert "weight_grad" not in names
    assert "d router.weight" in ours
    assert "d experts.w1" not in ours
    assert_same_step(ours, step(on("reference", moe), tokens()))


def test_input_without_gradient():
    """A first layer: x has no gradient, the parameters do."""
    moe = make("cosine")
    moe(tokens()).square().sum().div(4).backward()
    actual = gradients(moe)
    step(moe, tokens())
    assert all(map(torch.equal, actual, gradients(moe)))


@pytest.mark.parametrize("router", ["smoe", "cosine"])
def test_autocast(router):
    """Routing stays in float32; experts run in bfloat16 on tokens that routing did not see."""
    moe, steps = make(router), []
    for layer in (moe, on("reference", moe)):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            steps.append(step(layer, tokens()))
    ours, theirs = steps
    assert ours["y"].dtype == torch.bfloat16
    assert {v.dtype for name, v in ours.items() if name.startswith("d")} == {torch.float32}
    exact = {name: value.double() for name, value in step(on("reference", moe).double(), tokens().double()).items()}
    assert_as_accurate(ours, theirs, exact)


# ---------------------------------------------------------------------------------------------------------------------
# Promises


@pytest.mark.parametrize(("router", "options"), [p for p in EVERY_ROUTER if p.id != "cosine-10"])
def test_launches(router, options):
    """Only seen, not run: what they would compute does not matter here."""
    moe, names = make(router, options), []
    with observing(lambda launch: names.append(launch.name), architecture="sm90"):
        y = moe(tokens().requires_grad_())
        assert names == FORWARD
        names.clear()
        y.square().mean().backward()
    assert names == BACKWARD


def test_inference_keeps_no_preactivation():
    stored = []
    with observing(lambda launch: stored.append(launch.args.get("STORE_Z"))), torch.no_grad():
        make()(tokens())
    assert stored == [None, None, False, None, None]


@pytest.mark.parametrize("router", ["smoe", "cosine"])  # cosine sums the most parts; test_gpu.py takes them all
def test_same_bits_every_time(router):
    moe, x = make(router, dtype=torch.bfloat16, num_experts=3, top_k=2), tokens(2, 50, 24, dtype=torch.bfloat16)
    first, second = step(moe, x), step(moe, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("router", COMPARED)  # those of v2 are made of what these launch
def test_compiles_without_graph_breaks(router):
    torch.compiler.reset()
    moe, inputs = make(router, num_experts=3, top_k=2), tokens(2, 5, 24)
    expected = step(moe, inputs)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    moe.zero_grad()
    x = inputs.requires_grad_()
    torch.manual_seed(2)
    y = compiled(x)
    (y.double().square().sum() / 4).backward()
    torch.testing.assert_close(y, expected["y"])
    torch.testing.assert_close(x.grad, expected["dx"])
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"d {name}"])
