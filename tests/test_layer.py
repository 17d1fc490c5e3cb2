"""The layer against independent truths: the dense MLP it was copied from, fp64, finite differences, invariants."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from backends import CPU_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from libmoe_fast import ROUTERS, ConfigError, MoE, Routing, record_routing
from libmoe_fast.experts import activation_name
from libmoe_fast.reference import ACTIVATIONS, activate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def sequential(D=16, H=24, O=12, act=None, bias=True):
    return nn.Sequential(nn.Linear(D, H, bias=bias), act or nn.GELU(), nn.Linear(H, O, bias=bias))


def fixed_routing(moe: MoE, index: torch.Tensor, weights: torch.Tensor) -> MoE:
    """Replaces the router by one that always answers the same."""

    class Fixed(nn.Module):
        spec = dataclasses.replace(moe.router.spec, aux=False)

        def forward(self, x, **context):
            probs = torch.zeros(x.shape[0], self.spec.num_experts, dtype=weights.dtype)
            return Routing(index, weights, probs, probs)

    moe.router = Fixed()
    return moe


def per_token(x, index, weights, experts):
    """y_t one token and one chosen expert at a time: the definition, without masks, sorting or batching."""
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(experts.out_features, dtype=x.dtype)
        for k in range(index.shape[1]):
            e = index[t, k]
            z = experts.w1[e] @ x[t] + (experts.bias1[e] if experts.bias1 is not None else 0)
            y = y + weights[t, k] * (
                experts.w2[e] @ activate(z, experts.activation, experts.gated)
                + (experts.bias2[e] if experts.bias2 is not None else 0)
            )
        rows.append(y)
    return torch.stack(rows) if rows else x.new_zeros(0, experts.out_features)


UPCYCLED = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, options in [
        ("smoe", {}),
        ("smoe", {"noise": "gaussian"}),
        ("smoe", {"noise": "learned"}),
        ("cosine", {}),
        ("cosine", {"temperature": 0.07, "learn_temperature": True}),
        ("cosine", {"proj_dim": 4}),
        ("perturbed_cosine", {}),
        ("sigmoid", {}),
        ("sigmoid", {"normalize": "sum"}),
        ("hyper", {}),
    ]
]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (6, 3), (3, 3), (5, 1)], ids=str)  # K = N, K = 1, odd
@pytest.mark.parametrize(("router", "options"), UPCYCLED)
def test_upcycled_equals_dense(router, options, num_experts, top_k, backend):
    """The most useful test there is: weights that sum to 1 over equal experts change nothing."""
    torch.manual_seed(0)
    mlp, x = sequential(), torch.randn(2, 9, 16)
    moe = MoE.from_dense(
        mlp, router=router, router_options=options, num_experts=num_experts, top_k=top_k, backend=backend
    )
    assert (moe(x) - mlp(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [True, False, (True, False)], ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(activation, gated, bias, backend):
    """float64 finite differences by x, gate weights and every expert tensor; O != D; one expert idle."""
    torch.manual_seed(0)
    moe = MoE(
        3,
        4,
        2,
        num_experts=4,
        top_k=2,
        activation=activation,
        gated=gated,
        bias=bias,
        dtype=torch.float64,
        backend=backend,
    )
    index = torch.tensor([[0, 3], [3, 1], [1, 0]])  # expert 2 idles
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def outputs(x, weights, *_):
        return fixed_routing(moe, index, weights)(x)

    assert torch.autograd.gradcheck(outputs, (x, weights, *moe.experts.parameters()))
    torch.testing.assert_close(outputs(x, weights), per_token(x, index, weights, moe.experts))


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck_whole_layer(router, backend):
    """Through the router and its auxiliary loss as well."""
    torch.manual_seed(3)
    moe = MoE(4, 5, 3, num_experts=3, top_k=2, router=router, dtype=torch.float64, backend=backend, aux_mode="return")
    for parameter in moe.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: moe(x), (x, *moe.parameters()))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 33),
    dims=st.tuples(st.integers(1, 19), st.sampled_from([1, 7, 269]), st.integers(1, 19)),  # 269 = 4304 / 16
    experts=st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    skew=st.sampled_from(["random", "one takes all", "ties"]),
    contiguous=st.booleans(),
    backend=st.sampled_from(CPU_BACKENDS),
)
def test_any_size_and_load(tokens, dims, experts, skew, contiguous, backend):
    """Forward against the per-token definition, gradients against autograd through it, in float64."""
    torch.manual_seed(tokens)
    (D, H, O), (N, K) = dims, experts
    moe = MoE(D, H, O, num_experts=N, top_k=K, dtype=torch.float64, backend=backend, aux_mode="off")
    if skew != "random":
        moe.router.weight.data.zero_()  # every score ties: the lowest K experts take all, the others idle
    if skew == "one takes all":
        moe.router.weight.data[-1] = 1.0
    x = torch.randn(tokens, D, dtype=torch.float64)
    if skew == "one takes all":
        x = x.abs()
    x = (x if contiguous else x.repeat_interleave(2, 1)[:, ::2]).requires_grad_()

    y = moe(x)
    routing = moe.router(x)
    expected = per_token(x, routing.index, routing.weights, moe.experts)
    torch.testing.assert_close(y, expected)
    inputs = (x, *moe.experts.parameters())
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, inputs, grad)
    wanted = torch.autograd.grad(expected, inputs, grad, allow_unused=True, materialize_grads=True) if tokens else None
    for a, w in zip(actual, wanted or [torch.zeros_like(i) for i in inputs], strict=True):
        torch.testing.assert_close(a, w)


@pytest.mark.parametrize("router", ROUTERS)
def test_permuting_tokens_permutes_outputs(router):
    torch.manual_seed(0)
    moe = MoE(16, 24, 16, num_experts=6, top_k=3, router=router, dtype=torch.float64).eval()
    moe.experts.w2.data.normal_()
    x, permutation = torch.randn(50, 16, dtype=torch.float64), torch.randperm(50)
    torch.testing.assert_close(moe(x[permutation]), moe(x)[permutation])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_error_is_pytorchs_own(dtype, backend):
    """Against float64 on the same rounded inputs: at most twice the error of a per-expert loop of F.linear."""
    torch.manual_seed(0)
    N, K, T, D, H = 4, 2, 64, 72, 269
    moe = MoE(D, H, D, num_experts=N, top_k=K, dtype=dtype, backend=backend, aux_mode="off")
    index = torch.rand(T, N).argsort(-1)[:, :K]
    weights = torch.rand(T, K, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    x, grad = torch.randn(T, D, dtype=dtype).requires_grad_(), torch.randn(T, D, dtype=dtype)
    params = list(moe.experts.parameters())

    def loop(x, weights, w1, b1, w2, b2):
        y = torch.zeros(T, D, dtype=x.dtype)
        for e in range(N):
            t, k = torch.where(index == e)
            out = F.linear(F.gelu(F.linear(x[t], w1[e], b1[e])), w2[e], b2[e])
            y = y.index_add(0, t, out * weights[t, k, None].to(x.dtype))
        return y

    def run(function, *inputs):
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))]

    exact = run(loop, *(t.detach().double().requires_grad_() for t in (x, weights, *params)))
    theirs = run(loop, x, weights, *params)
    ours = run(lambda x, weights, *_: fixed_routing(moe, index, weights)(x), x, weights, *params)
    for name, a, b, truth in zip(["y", "dx", "dw", "dw1", "db1", "dw2", "db2"], ours, theirs, exact, strict=True):
        error, allowed = ((v.double() - truth).norm() / truth.norm() for v in (a, b))
        assert error <= 2 * allowed + 1e-15, f"{name}: {error:.2e}, PyTorch's own {allowed:.2e}"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_idle_experts_get_zero_gradients(backend):
    moe = MoE(8, 16, 8, num_experts=4, top_k=1, router="smoe", backend=backend)
    moe.router.weight.data.zero_()  # ties: expert 0 takes all
    moe(torch.randn(10, 8)).sum().backward()
    for name, parameter in moe.experts.named_parameters():
        assert parameter.grad[0].abs().sum() > 0, name
        assert torch.equal(parameter.grad[1:], torch.zeros_like(parameter.grad[1:])), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("router", ["smoe", "cosine", "perturbed_cosine", "sigmoid"])
def test_one_choice_of_weight_one_teaches_the_router_nothing(router, backend):
    """Warned of: the weight is 1 whatever the scores, so the task's loss has no say in them."""
    with pytest.warns(UserWarning, match=f"router '{router}' with top_k = 1: the one gate weight .* is always 1"):
        moe = MoE(8, 16, 8, num_experts=4, top_k=1, router=router, aux_mode="off", backend=backend)
    moe(torch.randn(10, 8)).square().sum().backward()
    for name, parameter in moe.router.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-6, name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("router", ["smoe", "sigmoid"])
def test_one_choice_learns_from_its_probability(router, backend, recwarn):
    """Switch Transformer, eq. 2: y = p E(x) with the chosen expert's p, through which the router learns."""
    torch.manual_seed(0)
    options = {"router_options": {"normalize": "none"}, "aux_mode": "off", "backend": backend}
    moe, x = MoE(8, 16, 8, num_experts=4, top_k=1, router=router, **options), torch.randn(10, 8)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    y = moe(x)
    scores = x @ moe.router.weight.T + (0 if moe.router.bias is None else moe.router.bias)
    p, chosen = (scores.softmax(-1) if router == "smoe" else scores.sigmoid()).max(-1)
    experts = moe.experts
    a = F.gelu(torch.einsum("thd,td->th", experts.w1[chosen], x) + experts.bias1[chosen])
    expected = torch.einsum("toh,th->to", experts.w2[chosen], a) + experts.bias2[chosen]
    torch.testing.assert_close(y, p.unsqueeze(1) * expected)
    y.square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-3


def test_one_expert_needs_no_router(recwarn):
    """N = 1: a dense layer in all but name; its gate weight is rightly 1."""
    MoE(8, 16, 8, num_experts=1, top_k=1)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_backward_is_deterministic():
    torch.manual_seed(0)
    moe, x = MoE(32, 64, 32, num_experts=8, top_k=4, dtype=torch.bfloat16), torch.randn(300, 32).bfloat16()
    runs = []
    for _ in range(3):
        x_ = x.clone().requires_grad_()
        moe.zero_grad()
        moe(x_).square().sum().backward()
        runs.append([x_.grad, *(p.grad.clone() for p in moe.parameters())])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_frozen_experts_train_the_router():
    moe = MoE(8, 16, 8, num_experts=4, top_k=2)
    moe.experts.requires_grad_(False)
    moe(torch.randn(10, 8)).square().sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0
    assert moe.experts.w1.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# The auxiliary loss


@pytest.fixture
def pair():
    """The same layer twice: one attaches its auxiliary loss, one returns it to be added by hand."""
    torch.manual_seed(0)
    attached = MoE(8, 16, 8, num_experts=4, top_k=2, balance_coef=0.3, z_coef=0.2)
    returned = copy.deepcopy(attached)
    returned.aux_mode = "return"
    return attached, returned


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_attached_aux_loss_equals_added(pair):
    attached, returned = pair
    x = torch.randn(3, 5, 8)
    attached(x).square().mean().backward()
    y, aux_loss = returned(x)
    (y.square().mean() + aux_loss).backward()
    torch.testing.assert_close(gradients(attached), gradients(returned))
    torch.testing.assert_close(attached.aux_loss, aux_loss.detach())
    torch.testing.assert_close(attached.aux_loss, 0.3 * attached.balance_loss + 0.2 * attached.z_loss)


@pytest.mark.parametrize("factor", [1 / 4, 65536.0], ids=["accumulation", "fp16-scale"])
def test_aux_loss_takes_the_scale_of_the_loss(pair, factor):
    attached, returned = pair
    x = torch.randn(3, 5, 8)
    loss = attached(x).square().mean()
    (loss * factor).backward()
    y, aux_loss = returned(x)
    ((y.square().mean() + aux_loss) * factor).backward()
    torch.testing.assert_close(gradients(attached), gradients(returned))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_aux_loss_survives_activation_checkpointing(pair, use_reentrant):
    attached, plain = pair
    plain.aux_mode = "attach"
    x = torch.randn(3, 5, 8, requires_grad=True)
    with record_routing(attached) as recorder:
        loss = checkpoint(attached, x, use_reentrant=use_reentrant).square().mean()
        (loss / 2).backward()
    (plain(x).square().mean() / 2).backward()
    torch.testing.assert_close(gradients(attached), gradients(plain))
    assert [len(r) for r in recorder.records.values()] == [1]  # the recomputation is not a second forward


def test_aux_loss_is_off_in_evaluation(pair):
    attached, returned = pair
    x = torch.randn(3, 5, 8)
    for layer in pair:
        layer.eval()
    attached(x).square().mean().backward()
    y, aux_loss = returned(x)
    y.square().mean().backward()
    assert aux_loss.item() == 0
    torch.testing.assert_close(gradients(attached), gradients(returned))


def test_balance_is_per_sequence_unless_asked(pair):
    x = torch.randn(3, 5, 8)
    layer = pair[0]
    layer(x)
    per_sequence = layer.balance_loss
    singles = []
    for sequence in x:
        layer(sequence)
        singles.append(layer.balance_loss)
    torch.testing.assert_close(per_sequence, torch.stack(singles).mean())
    layer.balance_scope = "batch"
    layer(x)
    whole = layer.balance_loss
    layer(x.flatten(0, 1))
    torch.testing.assert_close(whole, layer.balance_loss)


def test_statistics_can_be_copied_and_cleared(pair):
    layer = pair[0]
    layer(torch.randn(3, 5, 8)).sum().backward()
    assert copy.deepcopy(layer).aux_loss == layer.aux_loss
    torch.testing.assert_close(layer.last_expert_share.sum().item(), 1.0)
    layer.clear_statistics()
    assert layer.aux_loss is None


def test_aux_scale_stays_float32_and_out_of_checkpoints():
    layer = MoE(8, 16, 8, num_experts=2, top_k=1, device="meta").to_empty(device="cpu").bfloat16()
    assert layer.aux_scale.dtype == torch.float32
    assert layer.aux_scale.item() == 1
    assert "aux_scale" not in layer.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# Drop-in behaviour


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_tokens(backend):
    moe = MoE(8, 16, 4, num_experts=4, top_k=2, backend=backend)
    x = torch.empty(2, 0, 8, requires_grad=True)
    y = moe(x)
    y.sum().backward()
    assert y.shape == (2, 0, 4)
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())
    assert moe.last_expert_share.tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bf16: what the linear before it returns
def test_autocast_acts_like_linear(dtype):
    torch.manual_seed(0)
    mlp = sequential()
    moe, x = MoE.from_dense(mlp), torch.randn(4, 16).to(dtype)
    exact = copy.deepcopy(mlp).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dense = moe(x), mlp(x)
        with record_routing(moe) as recorder:
            moe(x)
    assert y.dtype == dense.dtype == torch.bfloat16
    error, allowed = ((v.double() - exact).norm() for v in (y, dense))
    assert error <= 2 * allowed, f"{error:.2e}, PyTorch's own {allowed:.2e}"
    assert recorder.records[""][0].weights.dtype == torch.float32
    y.sum().backward()
    assert moe.experts.w1.grad.dtype == torch.float32


def test_records_keep_images_apart():
    moe = MoE(8, 16, 8, num_experts=4, top_k=2)
    with record_routing(moe) as recorder:
        moe(torch.randn(3, 5, 8))
    moe(torch.randn(3, 5, 8))
    (record,) = recorder.records[""]
    assert [tuple(t.shape) for t in record[:4]] == [(3, 5, 2), (3, 5, 2), (3, 5, 4), (3, 5, 4)]
    assert not record.weights.requires_grad


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_without_graph_breaks(router, backend):
    torch.manual_seed(0)
    torch.compiler.reset()
    moe, x = MoE(8, 16, 8, num_experts=4, top_k=2, router=router, backend=backend), torch.randn(3, 5, 8)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.square().mean().div(4).backward()
    actual = gradients(moe)
    moe.zero_grad()
    expected = moe(x)
    expected.square().mean().div(4).backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(actual, gradients(moe))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_around_experts_that_break_the_graph(backend):
    """As an adapter around them may, and those that processes share do."""

    class Uncompiled(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts, self.w1 = experts, experts.w1

        @torch.compiler.disable
        def forward(self, *arguments):
            return self.experts(*arguments)

    torch.compiler.reset()
    torch.manual_seed(0)
    moe, x = MoE(8, 16, 8, num_experts=4, top_k=2, backend=backend), torch.randn(3, 5, 8)
    expected = moe(x)
    losses = moe.statistics()
    moe.experts = Uncompiled(moe.experts)
    torch.testing.assert_close(torch.compile(moe, backend="aot_eager")(x), expected)
    torch.testing.assert_close(moe.statistics(), losses)


def test_compiles_with_inductor():
    """One real code generation (C++ on the CPU); the other routers share its graph structure."""
    torch.compiler.reset()
    moe, x = MoE(8, 16, 8, num_experts=4, top_k=2, router="cosine"), torch.randn(3, 5, 8)
    torch.testing.assert_close(torch.compile(moe, fullgraph=True)(x), moe(x))


class GatedMLP(nn.Module):
    """LlamaMLP's layout."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedGatedMLP(nn.Module):
    """Phi3MLP's layout."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 24, bias=False), nn.Linear(12, 8, bias=False)
        self.activation_fn = nn.SiLU()

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


@pytest.mark.parametrize("mlp", [GatedMLP, FusedGatedMLP])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gated_mlps_upcycle(mlp, backend):
    torch.manual_seed(0)
    dense, x = mlp(), torch.randn(5, 8)
    torch.testing.assert_close(MoE.from_dense(dense, backend=backend)(x), dense(x))


def test_activations_are_recognised_by_what_they_compute():
    for name, function in ACTIVATIONS.items():
        module = nn.Module()
        module.forward = function
        assert activation_name(module) == name
    with pytest.raises(ConfigError, match="Tanh computes none of"):
        activation_name(nn.Tanh())


def test_from_dense_keeps_dtype_mode_and_frozenness():
    mlp = sequential().bfloat16().eval().requires_grad_(False)
    moe = MoE.from_dense(mlp)
    assert not moe.training
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in moe.experts.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: MoE.from_dense(nn.Linear(4, 4)), "Linear with children", id="no-mlp"),
        pytest.param(lambda: MoE.from_dense(sequential(act=nn.Softplus())), "Softplus computes none", id="act"),
        pytest.param(lambda: MoE(4, 8, 4, num_experts=2, top_k=3), "top_k is 3 with num_experts 2", id="K>N"),
        pytest.param(lambda: MoE(4, 8, 4, num_experts=2, top_k=1, activation="mish"), "is 'mish'", id="mish"),
        pytest.param(lambda: MoE(4, 8, 4, num_experts=2, top_k=1, aux_mode="add"), "aux_mode is 'add'", id="mode"),
        pytest.param(lambda: MoE(4, 8, 4, num_experts=2, top_k=1, z_coef=-1.0), "z_coef is -1.0", id="coef"),
        pytest.param(
            lambda: MoE(4, 8, 4, num_experts=2, top_k=1)(torch.randn(3, 5)), r"shape \(3, 5\).* D = 4", id="D"
        ),
        pytest.param(
            lambda: MoE(4, 8, 4, num_experts=2, top_k=1)(torch.randn(3, 4).double()),
            "tokens are torch.float64",
            id="dtype",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_memory_kept_for_backward(router, backend):
    """At CLIP-L's sizes at most 2TD + 2TKH bytes in bf16, and 1% for the routing: no float32 copy, no [T*K, O]."""
    T, D, H, K = 256 if backend == "cpu" else 64, 1024, 4096, 2  # the reference runs every expert on every token
    moe = MoE(D, H, D, num_experts=4, top_k=K, router=router, backend=backend, dtype=torch.bfloat16)
    own = {t.untyped_storage().data_ptr() for t in (*moe.parameters(), *moe.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe(torch.randn(T, D, dtype=torch.bfloat16, requires_grad=True))
    kept_bytes = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    gate = 4 * 2 * 4 * (D + 1) if router == "hyper" else 0  # the generated gate, whatever T is
    assert 2 * T * D <= kept_bytes <= 1.01 * (2 * T * D + 2 * T * K * H) + gate
