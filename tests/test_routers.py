"""Each router against a closed form worked out by hand, finite differences, and the promises of the pipeline."""

import math

import pytest
import torch

import libmoe_fast
from libmoe_fast import ConfigError, Router, RouterSpec, build_router, register_router, routers
from libmoe_fast.reference import route

# One token x = (3, 4), three experts w = (1, 0), (0, 1), (1, 1): scores 3, 4, 7; norms 5 and 1, 1, sqrt 2.
TOKEN = torch.tensor([[3.0, 4.0]])
WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
COSINES = (0.6, 0.8, 7 / (5 * math.sqrt(2)))


def softmax(*scores: float) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def worked_example(name: str, bias=(0.0, 0.0, 0.0), **options):
    router = build_router(name, 2, 3, 2, **options).eval()
    with torch.no_grad():
        router.weight.copy_(WEIGHT)
        if router.bias is not None:
            router.bias.copy_(torch.tensor(bias))
    return router(TOKEN)


def assert_routing(routing, index, weights, probs):
    assert routing.index.tolist() == [index]
    torch.testing.assert_close(routing.weights[0].tolist(), weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(routing.probs[0].tolist(), probs, rtol=1e-6, atol=1e-7)


def test_smoe_closed_form():
    # softmax(7) / (softmax(7) + softmax(4)) = 1 / (1 + e^-3)
    assert_routing(worked_example("smoe"), [2, 1], [sigmoid(3), sigmoid(-3)], softmax(3, 4, 7))


def test_cosine_closed_form():
    probs = softmax(*COSINES)
    # the bias lifts expert 0 over 1 in the selection, and enters the weights, but not p
    weights = softmax(probs[2] + 0.0, probs[0] + 0.2)
    assert_routing(worked_example("cosine", bias=(0.2, 0.0, 0.0)), [0, 2], weights[::-1], probs)


def test_cosine_temperature_closed_form():
    probs = softmax(*(c / 0.1 for c in COSINES))
    weights = softmax(probs[2], probs[1])
    for options in ({"temperature": 0.1}, {"temperature": 0.1, "learn_temperature": True}):
        assert_routing(worked_example("cosine", **options), [2, 1], weights, probs)


def test_perturbed_cosine_closed_form():
    scores = (3 / (5.1 * 1.1), 4 / (5.1 * 1.1), 7 / (5.1 * (math.sqrt(2) + 0.1)))
    probs = softmax(*scores)
    assert_routing(worked_example("perturbed_cosine"), [2, 1], softmax(probs[2], probs[1]), probs)


def test_sigmoid_closed_form():
    gates = [sigmoid(3 + 0.5), sigmoid(4 - 9), sigmoid(7)]  # the bias is in the score: expert 1 falls behind 0
    bias = (0.5, -9.0, 0.0)
    probs = softmax(*gates)
    pair = [probs[2] / (probs[2] + probs[0]), probs[0] / (probs[2] + probs[0])]
    assert_routing(worked_example("sigmoid", bias=bias), [2, 0], pair, probs)
    pair = [gates[2] / (gates[2] + gates[0]), gates[0] / (gates[2] + gates[0])]
    assert_routing(worked_example("sigmoid", bias=bias, normalize="sum"), [2, 0], pair, gates)
    assert_routing(worked_example("sigmoid", bias=bias, normalize="none"), [2, 0], [gates[2], gates[0]], gates)


def test_hyper_closed_form():
    router = build_router("hyper", 4, 2, 2).eval()  # D / 4 = 1 hidden unit
    with torch.no_grad():
        router.embedding.copy_(torch.tensor([1.0, 2.0, 0.0, 0.0]))
        router.hypernet.w1.copy_(torch.tensor([[3.0, 0.5, 0.0, 0.0]]))
        router.hypernet.b1.fill_(-1.0)  # hidden = relu(3 + 1 - 1) = 3
        router.hypernet.w2.copy_(torch.tensor([[1.0, 0, 0, 0, 2.0, 0, 1.0, 0, 0, 0]]).t())
        router.hypernet.b2.zero_()  # W = 3 * (e1, e2), b = 3 * (2, 0)
    routing = router(torch.tensor([[1.0, 2.0, 5.0, 5.0]]))  # scores 3 + 6 = 9 and 6
    assert_routing(routing, [0, 1], [sigmoid(3), sigmoid(-3)], [9.0, 6.0])


def test_learned_noise_closed_form():
    """score_i + eps_i * softplus(x . noise_weight_i), Shazeer et al. 2017, eq. 4."""
    spec = RouterSpec(num_experts=3, top_k=1, noise="learned")
    noise, noise_weight = torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    routing = route(TOKEN, WEIGHT, spec=spec, noise=noise, noise_weight=noise_weight)
    softplus = lambda z: math.log1p(math.exp(z))  # noqa: E731
    expected = [3 + softplus(3), 4 - 2 * softplus(0), 7.0]
    torch.testing.assert_close(routing.logits[0].tolist(), expected, rtol=1e-6, atol=1e-6)


def test_noise_is_for_training_only():
    router = build_router("smoe", 8, 4, 2, noise="gaussian", noise_std=5.0)
    x = torch.randn(64, 8)
    assert not torch.equal(router(x).logits, router(x).logits)
    router.eval()
    torch.testing.assert_close(router(x).logits, x @ router.weight.t())


def test_ties_go_to_the_lowest_index():
    routing = route(torch.ones(5, 3), torch.zeros(7, 3), spec=RouterSpec(num_experts=7, top_k=4))
    assert routing.index.tolist() == [[0, 1, 2, 3]] * 5


ALL_OPTIONS = [
    pytest.param("smoe", {}, id="smoe"),
    pytest.param("smoe", {"noise": "learned"}, id="smoe-noisy"),
    pytest.param("cosine", {}, id="cosine"),
    pytest.param("cosine", {"temperature": 0.3, "learn_temperature": True, "proj_dim": 3}, id="cosine-projected"),
    pytest.param("perturbed_cosine", {}, id="perturbed"),
    pytest.param("sigmoid", {}, id="sigmoid"),
    pytest.param("sigmoid", {"normalize": "sum"}, id="sigmoid-sum"),
    pytest.param("sigmoid", {"normalize": "none"}, id="sigmoid-none"),
    pytest.param("hyper", {}, id="hyper"),
]


@pytest.mark.parametrize(("name", "options"), ALL_OPTIONS)
@pytest.mark.parametrize("top_k", [3, 6], ids=["K<N", "K=N"])  # dense use is the paper's sigmoid router
def test_gradcheck(name, options, top_k):
    """float64 finite differences of weights, probabilities and logits by x and every parameter."""
    torch.manual_seed(1)
    router = build_router(name, 5, 6, top_k, dtype=torch.float64, **options)
    for parameter in router.parameters():
        parameter.data.normal_()  # away from the small gates of a fresh router
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def outputs(x, *_):
        torch.manual_seed(2)  # the same noise on every call
        return router(x)[1:4]

    assert torch.autograd.gradcheck(outputs, (x, *router.parameters()))


@pytest.mark.parametrize("name", ["cosine", "perturbed_cosine"])
def test_zero_tokens_have_finite_gradients(name):
    router = build_router(name, 4, 3, 2)
    x = torch.zeros(2, 4, requires_grad=True)
    router(x).weights.square().sum().backward()
    assert x.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_bf16_chooses_what_float32_chooses():
    """Scores are float32 whatever the activation dtype; a bf16 GEMM would flip many of these 4,096 choices."""
    torch.manual_seed(0)
    x, weight = torch.randn(4096, 64).bfloat16(), (torch.randn(8, 64) * 0.02).bfloat16()
    spec = RouterSpec(num_experts=8, top_k=2)
    expected = route(x.float(), weight.float(), spec=spec)
    routing = route(x, weight, spec=spec)
    assert torch.equal(routing.index, expected.index)
    assert routing.weights.dtype == torch.float32
    naive = (x @ weight.t()).float().softmax(-1).topk(2).indices
    assert not torch.equal(naive, expected.index)


def test_hyper_schedule():
    """round((K_max - 1) * step / total) + 1 in training (half to even, as Python rounds), K_max in evaluation."""
    router, x = build_router("hyper", 8, 4, 4), torch.randn(2, 8)
    assert router(x).index.shape == (2, 4)  # nobody tells it about progress
    seen = []
    for step in range(7):
        router.set_progress(step, 6)
        seen.append(router(x).index.shape[1])
    assert seen == [1, 1, 2, 3, 3, 3, 4]
    router.set_progress(0, 6)
    assert router.eval()(x).index.shape == (2, 4)


def test_hyper_hypernetwork_stays_frozen():
    router = build_router("hyper", 16, 4, 2).requires_grad_(True)
    assert [name for name, _ in router.named_parameters()] == ["embedding"]
    assert {f"hypernet.{n}" for n in ("w1", "b1", "w2", "b2")} < set(router.state_dict())


def test_hyper_generates_the_same_gate_in_parts(monkeypatch):
    router = build_router("hyper", 8, 5, 2).double()  # 45 numbers to generate
    w1, b1, w2, b2 = router.hypernet.buffers()
    embedding = router.embedding.detach()
    expected, pull = torch.func.vjp(lambda e: w2 @ torch.relu(w1 @ e + b1) + b2, embedding)
    upstream = torch.randn(45, dtype=torch.float64)
    for rows in (1, 44, 45, 1000):
        monkeypatch.setattr("libmoe_fast.routers.GENERATED_AT_A_TIME", rows)
        router.zero_grad()
        flat = torch.cat([torch.cat([w, b[None]]) for w, b in zip(*router.hypernet(router.embedding), strict=True)])
        flat.backward(upstream)
        torch.testing.assert_close(flat, expected)
        torch.testing.assert_close(router.embedding.grad, *pull(upstream))


def test_gates_start_small():
    """N(0, 0.02): the sample deviation of 4 x 1,024 draws lies within 5 sigma = 5 * 0.02 / sqrt(2 * 4,096)."""
    torch.manual_seed(0)
    for name in libmoe_fast.ROUTERS.keys() - {"xmoe"}:  # whose embeddings have a length of their own
        router = build_router(name, 1024, 4, 2)
        weight = router.hypernet(router.embedding)[0] if name == "hyper" else router.weight
        # hyper's generated gates share a random hidden norm: its spread over 256 units adds 1 / sqrt(256) relative
        tolerance = 5 * 0.02 * (1 / math.sqrt(2 * 4096) + (name == "hyper") / math.sqrt(256))
        assert abs(weight.std().item() - 0.02) < tolerance, name


def test_sixth_router_takes_one_class(monkeypatch):
    monkeypatch.setattr(routers, "ROUTERS", dict(routers.ROUTERS))

    @register_router("linear_sigmoid")
    class LinearSigmoid(Router):
        def __init__(self, dim, num_experts, top_k, *, device=None, dtype=None):
            spec = RouterSpec(num_experts=num_experts, top_k=top_k, probability="sigmoid", gate="softmax")
            super().__init__(dim, spec, device=device, dtype=dtype)

    moe = libmoe_fast.MoE(8, 16, 8, num_experts=3, top_k=2, router="linear_sigmoid")
    assert moe(torch.randn(4, 8)).shape == (4, 8)
    with pytest.raises(ConfigError, match="taken"):
        register_router("linear_sigmoid")(type("Other", (Router,), {}))


def test_router_is_found_by_import_path():
    assert routers.find_router("libmoe_fast.routers:CosineRouter") is libmoe_fast.ROUTERS["cosine"]


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        pytest.param("cosin", (4, 2), {}, "unknown router 'cosin'.*perturbed_cosine", id="unknown"),
        pytest.param("no.module:X", (4, 2), {}, "cannot be imported", id="import"),
        pytest.param("torch.nn:Linear", (4, 2), {}, "not a subclass", id="no-router"),
        pytest.param("smoe", (4, 5), {}, "top_k is 5 with num_experts 4", id="K>N"),
        pytest.param("smoe", (4, 0), {}, "top_k is 0", id="K=0"),
        pytest.param("smoe", (4, 2), {"tau": 1}, "no option tau; it has: noise, noise_std", id="option"),
        pytest.param("smoe", (4, 2), {"noise": "loud"}, "noise is 'loud'", id="choice"),
        pytest.param("smoe", (4, 2), {"noise_std": -1.0}, "noise_std is -1.0", id="negative"),
        pytest.param("cosine", (4, 2), {"temperature": 0.0}, "must be a positive", id="temperature"),
        pytest.param("cosine", (4, 2), {"proj_dim": 0}, "proj_dim is 0", id="proj_dim"),
        pytest.param("sigmoid", (4, 2), {"normalize": "max"}, "normalize is 'max'", id="normalize"),
    ],
)
def test_bad_options(name, sizes, options, message):
    with pytest.raises(ConfigError, match=message):
        build_router(name, 8, *sizes, **options)
