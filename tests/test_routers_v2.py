"""The routers of LibMoE's second version, against their formulas written out."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from backends import CPU_BACKENDS

from libmoe_fast import ConfigError, MoE, build_router, record_routing, reference, set_training_progress
from libmoe_fast.analysis import RoutingCounts
from libmoe_fast.analysis.counter import counting
from libmoe_fast.spec import LossOptions

T, D, N, K = 21, 12, 5, 3


def randomized(router):
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def tokens(dtype=torch.float64):
    return torch.randn(T, D, dtype=dtype, generator=torch.Generator().manual_seed(1))


def layer(router, backend=None, **options):
    torch.manual_seed(0)
    moe = MoE(D, 16, D, num_experts=N, top_k=K, router=router, router_options=options, backend=backend).double()
    randomized(moe.router)
    return moe


def expert(moe, e, x):
    experts = moe.experts
    hidden = reference.activate(F.linear(x, experts.w1[e], experts.bias1[e]), experts.activation, experts.gated)
    return F.linear(hidden, experts.w2[e], experts.bias2[e])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_xmoe(backend):
    """p = softmax(1.5 cos(P x, w) / 0.3), weights a softmax over the chosen p, whatever the embeddings' length."""
    router, x = randomized(build_router("xmoe", D, N, K)).double(), tokens()
    assert router.weight.shape == (N, N // 2)
    low = x @ router.projection.weight.t()
    cosine = torch.stack([F.cosine_similarity(low, w[None], dim=-1) for w in router.weight], 1)  # [T, N]
    p = (1.5 * cosine / 0.3).softmax(-1)
    chosen, index = p.sort(-1, descending=True)
    routing = router(x, backend=backend)
    assert torch.equal(routing.index, index[:, :K])
    torch.testing.assert_close(routing.weights, chosen[:, :K].softmax(-1))
    torch.testing.assert_close(routing.logits, 1.5 * cosine)
    with torch.no_grad():
        router.weight *= 7
    torch.testing.assert_close(router(x, backend=backend).weights, routing.weights)


def test_xmoes_embeddings_start_at_their_length():
    for experts in (1, 2, 7):
        router = build_router("xmoe", D, experts, 1)
        torch.testing.assert_close(router.weight.norm(dim=-1), torch.full((experts,), 1.5))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("router", ["shared_v2", "shared_v3"])
@pytest.mark.parametrize(("mix", "scale"), [("mean", 1.0), ("sum", 2.5)])
def test_a_shared_expert_is_every_tokens(router, mix, scale, backend):
    moe, x = layer(router, backend, mix=mix, scale=scale), tokens()
    scores = x @ moe.router.weight.t()  # [T, N - 1]
    p = scores.softmax(-1) if router == "shared_v2" else scores.sigmoid()
    chosen, index = p.topk(K - 1)
    weights = chosen / chosen.sum(-1, keepdim=True)
    outputs = torch.stack([expert(moe, e, x) for e in range(N)], 1)  # [T, N, D]
    routed = (weights[..., None] * outputs.gather(1, index[..., None].expand(-1, -1, D))).sum(1)
    shared = outputs[:, -1]
    expected = (shared + routed) / 2 if mix == "mean" else shared + scale * routed
    torch.testing.assert_close(moe.eval()(x), expected)


@pytest.mark.parametrize("router", ["shared_v2", "shared_v3"])
def test_losses_and_shares_beside_a_shared_expert(router):
    """The losses are those of the routed experts; the shared one has 1 / K of all choices."""
    moe, x = layer(router), tokens()
    moe.train()(x)
    inner = build_router({"shared_v2": "smoe", "shared_v3": "sigmoid"}[router], D, N - 1, K - 1).double()
    with torch.no_grad():
        inner.weight.copy_(moe.router.weight)
    routing = reference.route(x, inner.weight, spec=moe.router.routed)
    share = torch.bincount(routing.index.flatten(), minlength=N - 1) / (T * K)
    torch.testing.assert_close(moe.last_expert_share.double(), torch.cat([share, share.new_tensor([1 / K])]).double())
    first = torch.bincount(routing.index[:, 0], minlength=N - 1) / T
    torch.testing.assert_close(moe.balance_loss, (N - 1) * (first * routing.probs.mean(0)).sum())
    torch.testing.assert_close(moe.z_loss, routing.logits.logsumexp(-1).square().mean())


def test_records_of_a_shared_expert_have_all_experts():
    moe = layer("shared_v2")
    with record_routing(moe) as recorder:
        moe(tokens()[None])
    (record,) = recorder.records[""]
    assert [tuple(t.shape) for t in record[:3]] == [(1, T, K), (1, T, K), (1, T, N)]
    torch.testing.assert_close(record.probs.sum(-1), torch.ones(1, T, dtype=torch.float64))
    assert (record.index[..., -1] == N - 1).all()
    assert not record.probs[..., -1].any()


def test_one_choice_beside_a_shared_expert_is_warned_of():
    """Its weight is always 1: the task's loss gives the gate no gradient."""
    with pytest.warns(UserWarning, match="gate weight of a token is always 1"):
        build_router("shared_v2", D, 4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_router("shared_v2", D, 4, 3)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1)])
def test_a_shared_expert_needs_another(experts, top_k):
    with pytest.raises(ConfigError, match=f"num_experts is {experts} and top_k {top_k}; with a shared expert"):
        build_router("shared_v2", D, experts, top_k)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_biases_balance_without_a_loss(backend):
    """+ rate for experts under the mean load since the last step, - rate above it; weights never see them."""
    moe, x = layer("shared_v3", backend, bias_rate=0.01), tokens()
    moe.train()
    for _ in range(2):  # two passes of one step count together
        index = moe.router(x, backend=backend).index
    load = 2 * torch.bincount(index.flatten(), minlength=N)[: N - 1]
    set_training_progress(moe, 1, 10)
    expected = 0.01 * (load.double().mean() - load).sign()
    torch.testing.assert_close(moe.router.bias.double(), expected)
    moe.eval()(x)
    set_training_progress(moe, 2, 10)  # evaluation was not counted
    torch.testing.assert_close(moe.router.bias.double(), expected)
    moe.router.bias = torch.tensor([9.0, 0, 0, 0])
    routing = moe.router(x, backend=backend)
    assert (routing.index[:, 0] == 0).all()
    p = (x @ moe.router.weight.t()).sigmoid().gather(1, routing.index[:, : K - 1])
    torch.testing.assert_close(routing.weights[:, : K - 1], p / p.sum(-1, keepdim=True) / 2)


def test_biases_of_a_long_run_even_out_the_load():
    moe = layer("shared_v3", bias_rate=0.02)
    x = torch.randn(400, D, dtype=torch.float64) + 0.5 * moe.router.weight.detach()[0]  # one expert's favour

    def spread():
        share = torch.bincount(moe.router(x).index.flatten(), minlength=N)[: N - 1] / (400 * (K - 1))
        return (share - 1 / (N - 1)).abs().max().item()

    before = spread()
    for step in range(100):
        moe.train()(x)
        set_training_progress(moe, step, 100)
    assert before > 0.05
    assert spread() < 0.4 * before


def test_biases_are_state_in_float32_that_no_optimiser_has():
    moe = layer("shared_v3", bias_rate=0.001)
    moe.router.bias += 0.123456789
    kept = moe.router.bias.clone()
    assert moe.to(torch.bfloat16).router.bias.dtype == torch.float32
    assert torch.equal(moe.router.bias, kept)
    assert not any("bias" in name for name, _ in moe.router.named_parameters())
    other = layer("shared_v3", bias_rate=0.001).to(torch.bfloat16)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.router.bias, kept)
    assert moe(tokens(torch.bfloat16)).isfinite().all()


PROCESS = """
import sys, torch
from libmoe_fast import build_router
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
router = build_router("shared_v3", 2, 3, 2, mix="sum", bias_rate=0.5).train()
with torch.no_grad():
    router.weight.copy_(torch.tensor([[1.0, 0], [0, 1]]))
if rank == 0:  # the other saw no image in this step
    router(torch.tensor([[3.0, 0], [3, 0], [0, 3]]))
router.set_progress(1, 2)
print(router.bias.tolist())
"""


def test_all_processes_count_together(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), tmp_path / "meet"], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    assert [process.communicate(timeout=300)[0].split(b"\n")[-2] for process in processes] == [b"[-0.5, 0.5]"] * 2


def ternary(moe, x):
    """The layer, slot by slot: N experts, the same negated, K null slots; and its probabilities."""
    scores = x @ moe.router.weight.t()
    lowered = scores + torch.tensor([0.0] * N + [-1.0] * N + [-10.0] * K, dtype=x.dtype)
    p = lowered.softmax(-1)
    chosen, slots = p.topk(K)
    outputs = torch.stack([expert(moe, e, x) for e in range(N)], 1)  # [T, N, D]
    y = torch.zeros_like(outputs[:, 0])
    for t in range(T):
        total = p[t, 2 * N :].sum() + sum(w for w, s in zip(chosen[t], slots[t], strict=True) if s < 2 * N)
        for w, s in zip(chosen[t], slots[t], strict=True):
            if s < 2 * N:
                y[t] += (1 if s < N else -1) * w / total * outputs[t, s % N]
    return y, p, slots, scores


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("null", [0.0, 12.0], ids=["null slots far off", "null slots chosen"])
def test_ternary_choices(backend, null):
    moe, x = layer("tc_moe", backend), tokens()
    with torch.no_grad():
        moe.router.weight[2 * N :] += null * x.mean(0)
    expected, _, slots, _ = ternary(moe, x)
    kinds = {"plus": slots < N, "minus": (slots >= N) & (slots < 2 * N), "null": slots >= 2 * N}
    assert kinds["plus"].any()
    assert kinds["minus"].any()
    assert kinds["null"].any() == bool(null)
    torch.testing.assert_close(moe.eval()(x), expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_an_expert_chosen_with_both_signs_counts_twice(backend):
    moe, x = layer("tc_moe", backend), tokens()
    with torch.no_grad():
        moe.router.weight[N : 2 * N] = moe.router.weight[:N]
        moe.router.weight[2 * N :] = 0
    expected, _, slots, _ = ternary(moe, x)
    assert any(len(set(row)) < K for row in (slots % N).tolist())
    torch.testing.assert_close(moe.eval()(x), expected)


def test_losses_of_ternary_choices():
    moe, x = layer("tc_moe", reward=0.5), tokens()
    with torch.no_grad():
        moe.router.weight[2 * N :] += 12 * x.mean(0)
    _, p, slots, scores = ternary(moe, x)
    base = p[:, :N] + p[:, N : 2 * N]
    base = base / base.sum(-1, keepdim=True)
    first = slots[:, 0]
    share = torch.bincount(first[first < 2 * N] % N, minlength=N) / T
    balance = N * (share * base.mean(0)).sum()
    z = scores.logsumexp(-1).square().mean()
    aux = moe.router(x, loss_options=LossOptions(0.1, 0.01)).aux
    torch.testing.assert_close(aux.balance, balance)
    torch.testing.assert_close(aux.z, z)
    torch.testing.assert_close(aux.total, 0.1 * balance + 0.01 * z - 0.5 * p[:, 2 * N :].sum(-1).mean())
    counted = slots[slots < 2 * N] % N
    torch.testing.assert_close(aux.share.double(), torch.bincount(counted, minlength=N).double() / counted.numel())


PLUS_PLUS = [
    pytest.param({}, id="as LibMoE v2"),
    pytest.param({"copies": 2, "constants": 2, "zero_factor": 1.0}, id="fused"),
    pytest.param({"zeros": 0, "constants": 0, "copies": 1}, id="copies only"),
    pytest.param({"constants": 0, "zeros": 2}, id="zeros only"),
]


def plus_plus(moe, x):
    """MoE++ written out: y, p [T, slots], slots [T, K] and scores."""
    router = moe.router
    scores = x @ router.weight.t()
    p = scores.softmax(-1)
    chosen, slots = p.topk(K)
    outputs = [expert(moe, e, x) for e in range(N)] + [torch.zeros_like(x)] * router.zeros + [x] * router.copies
    for j in range(router.constants):
        a, b = (x @ router.mix[j].t()).softmax(-1).split(1, dim=-1)
        outputs.append(a * x + b * router.constant[j])
    every = torch.stack(outputs, 1)  # [T, slots, D]
    picked = every.gather(1, slots.unsqueeze(-1).expand(-1, -1, D))
    return (chosen / chosen.sum(-1, keepdim=True)).unsqueeze(-1).mul(picked).sum(1), p, slots, scores


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("options", PLUS_PLUS)
def test_moe_plus_plus(options, backend):
    """Outputs and all gradients, where some tokens choose experts, some both, and one of them no expert at all."""
    moe, x = layer("moe_plus_plus", backend, **options), tokens().requires_grad_()
    moe.aux_mode = "off"
    with torch.no_grad():
        moe.router.weight[N:] += 0.3 * x[0]
    expected, _, slots, _ = plus_plus(moe, x)
    assert (slots >= N).any()
    assert ((slots < N).sum(-1) == K).any()
    y = moe(x)
    torch.testing.assert_close(y, expected)
    dy, learned = torch.randn_like(y), [x, *moe.parameters()]
    grads, exact = (torch.autograd.grad(out, learned, dy, allow_unused=True) for out in (y, expected))
    torch.testing.assert_close(grads, exact)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_choice_beside_the_experts_runs_none(backend):
    """All tokens choose the zeros: nothing comes out, and no expert's weight is even read."""
    moe, x = layer("moe_plus_plus", backend, zeros=3, constants=0), tokens()
    moe.aux_mode = "off"
    x[:, 0] = 50.0
    x.requires_grad_()
    with torch.no_grad():
        moe.router.weight.zero_()[N:, 0] = 1.0
        if backend == "cpu":  # reference.py runs every expert on every token
            moe.experts.w1.fill_(math.nan)
    y = moe(x)
    assert not y.any()
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert not dx.any()


@pytest.mark.parametrize("options", [{}, {"zero_factor": 1.0}], ids=["zeros weigh more", "fused"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_losses_of_moe_plus_plus(options, backend):
    moe, x = layer("moe_plus_plus", backend, **options), tokens()
    with torch.no_grad():
        moe.router.weight[N:] += 0.3 * x[0]
    _, p, slots, scores = plus_plus(moe, x)
    factor = torch.ones(N + 2, dtype=p.dtype)
    factor[N] = moe.router.zero_factor
    first = torch.bincount(slots[:, 0], minlength=N + 2) / T
    balance = (N + 2) * (factor * first * p.mean(0)).sum()
    z = scores.logsumexp(-1).square().mean()
    routing = moe.router(x, loss_options=LossOptions(0.1, 0.01), backend=backend)
    torch.testing.assert_close(routing.aux.total, 0.1 * balance + 0.01 * z)
    share = torch.bincount(slots.flatten(), minlength=N + 2)[:N].double() / slots.numel()
    torch.testing.assert_close(routing.aux.share.double(), share)
    torch.testing.assert_close(routing.probs, p)


def test_moe_plus_plus_between_other_widths_has_experts_only():
    """As LibMoE v2's projector."""
    torch.manual_seed(0)
    moe = MoE(D, 16, 7, num_experts=N, top_k=K, router="moe_plus_plus")
    torch.manual_seed(0)
    plain = MoE(D, 16, 7, num_experts=N, top_k=K, router="smoe")
    assert moe.config()["router"] == "moe_plus_plus"
    moe.load_state_dict(plain.state_dict())
    x = tokens(torch.float32)
    assert torch.equal(moe(x), plain(x))


def test_choices_beside_the_experts_are_counted():
    """MoE++'s slots by their numbers; TC-MoE's null choices are nobody's."""
    x = tokens()
    for router, sizes in (("moe_plus_plus", N + 2), ("tc_moe", N)):
        moe = layer(router)
        with torch.no_grad():
            moe.router.weight[-2:] += 12 * x.mean(0)  # zero and constant; null slots
        model, counts = torch.nn.Sequential(moe), RoutingCounts(["0"])
        with counting(model, counts, "any", outputs=True):
            model(x)
        with record_routing(model) as recorder:
            model(x)
        (seen,) = recorder.records["0"]
        assert (seen.index >= N).any()
        expected = torch.bincount(seen.index.flatten(), minlength=N + 2)[:sizes]
        assert counts.tasks["any"].total.counts[0].tolist() == expected.tolist()


@pytest.mark.parametrize("router", ["xmoe", "shared_v2", "shared_v3", "tc_moe", "moe_plus_plus"])
@pytest.mark.parametrize("shape", [(0, D), (1, D), (2, 3, D)], ids=["no token", "one token", "images"])
def test_few_tokens(router, shape):
    moe = layer(router)
    y = moe.train()(torch.randn(*shape, dtype=torch.float64, requires_grad=True))
    assert y.shape == shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("xmoe", {"proj_dim": 0}, "proj_dim is 0"),
        ("xmoe", {"norm": -1.0}, "norm is -1.0"),
        ("shared_v2", {"mix": "max"}, "mix is 'max'; choose one of 'mean', 'sum'"),
        ("shared_v3", {"bias_rate": math.nan}, "bias_rate is nan"),
        ("tc_moe", {"reward": -1.0}, "reward is -1.0"),
        ("moe_plus_plus", {"zeros": -1}, "zeros is -1; it must be a whole number of at least 0"),
        ("moe_plus_plus", {"constants": True}, "constants is True"),
        ("moe_plus_plus", {"zero_factor": math.inf}, "zero_factor is inf"),
    ],
)
def test_options_that_cannot_be(router, options, message):
    with pytest.raises(ConfigError, match=message):
        build_router(router, D, N, K, **options)
