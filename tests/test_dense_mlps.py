"""What experts are copied from: every MLP whose copy would not compute the same is refused, by name."""

import pytest
import torch
import torch.nn.functional as F
from backends import CPU_BACKENDS
from torch import nn
from torch.nn.utils import prune

from libmoe_fast import ConfigError, MoE
from libmoe_fast.experts import Experts


class MLP(nn.Module):
    """fc1, activation_fn, fc2, as CLIP's MLP."""

    def __init__(self, **children):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


class Scaled(MLP):
    def forward(self, x):  # as FalconH1's: a multiplier that is no parameter
        return 0.7 * super().forward(x)


class Residual(MLP):
    def forward(self, x):
        return x + super().forward(x)


class TwoInputs(MLP):
    def forward(self, x, mask):
        return super().forward(x * mask)


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(MLP(), peft.LoraConfig(target_modules=["fc1", "fc2"])).base_model.model


def pruned():
    mlp = MLP()
    prune.l1_unstructured(mlp.fc1, "weight", amount=0.5)
    return mlp


def parametrized():
    mlp = MLP()
    nn.utils.parametrizations.weight_norm(mlp.fc1)
    return mlp


def hooked(module):
    mlp = MLP()
    mlp.get_submodule(module).register_forward_hook(lambda m, inputs, output: 2 * output)
    return mlp


def replaced_forward():
    mlp = MLP()
    mlp.forward = lambda x: x  # what accelerate does when it offloads
    return mlp


def with_buffer():
    mlp = MLP()
    mlp.register_buffer("scale", torch.ones(8))
    return mlp


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: MLP(norm=nn.LayerNorm(8)), r"children \['activation_fn', 'fc1', 'fc2', 'norm'\]", id="norm"
        ),
        pytest.param(lambda: MLP(drop=nn.Dropout(0.1)), "'drop'", id="dropout"),
        pytest.param(lambda: MLP(self_attn=nn.Linear(8, 8)), "'self_attn'", id="decoder-layer"),
        pytest.param(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)), "LayerNorm where", id="last"),
        pytest.param(adapted, r"peft\..*merge_and_unload", id="adapters"),
        pytest.param(parametrized, "ParametrizedLinear where", id="parametrized"),
        pytest.param(pruned, "weight_mask.*prune.remove", id="pruned"),
        pytest.param(with_buffer, "MLP holds scale", id="buffer"),
        pytest.param(lambda: hooked(""), "has hooks", id="hook"),
        pytest.param(lambda: hooked("fc2"), "Linear of MLP has hooks", id="inner-hook"),
        pytest.param(replaced_forward, "replaced forward", id="forward"),
        pytest.param(Scaled, "computes something else", id="scaled"),
        pytest.param(Residual, "computes something else", id="residual"),
        pytest.param(TwoInputs, "does not map tokens", id="two-inputs"),
    ],
)
def test_what_a_copy_would_lose_is_refused(make, message):
    mlp = make()
    with pytest.raises(ConfigError, match=message):
        MoE.from_dense(mlp)


@pytest.mark.parametrize("extra", [nn.Identity(), nn.Dropout(0.0)], ids=["identity", "no-dropout"])
def test_what_does_nothing_may_stay(extra):
    mlp, x = MLP(extra=extra), torch.randn(5, 8)
    torch.testing.assert_close(MoE.from_dense(mlp)(x), mlp(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_equal_in_every_dtype(dtype):
    """The comparison allows what a dtype rounds, and leaves mode and random state alone."""
    mlp = MLP().to(dtype).train()
    state = torch.get_rng_state()
    MoE.from_dense(mlp, router="hyper")
    assert mlp.training
    torch.set_rng_state(state)
    expected = torch.randn(3)
    torch.set_rng_state(state)
    from libmoe_fast.experts import dense_parts

    dense_parts(mlp)
    assert torch.equal(torch.randn(3), expected)


def test_weights_of_nan_are_copied():
    """A broken checkpoint is not an MLP of another kind."""
    mlp = MLP()
    nn.init.constant_(mlp.fc2.bias, torch.nan)
    assert MoE.from_dense(mlp).experts.bias2.isnan().all()


def test_functional_activation_needs_a_module():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    with pytest.raises(ConfigError, match="not a two-layer MLP"):
        MoE.from_dense(Functional())


# ---------------------------------------------------------------------------------------------------------------------
# With a layer norm before (VipLLaVA's and InternVL's projectors)


class Normed(nn.Module):
    """first: whether the norm is; its weights are not those of a fresh one."""

    def __init__(self, *, first=True):
        super().__init__()
        self.layer_norm = nn.LayerNorm(6, eps=1e-3)
        nn.init.normal_(self.layer_norm.weight)
        nn.init.normal_(self.layer_norm.bias)
        self.linear_1, self.act, self.linear_2 = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)
        self.first = first

    def forward(self, x):
        x = self.layer_norm(x) if self.first else x
        x = self.linear_2(self.act(self.linear_1(x)))
        return x if self.first else self.layer_norm(x)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_layer_norm_comes_along(backend):
    torch.manual_seed(0)
    mlp, x = Normed().double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    moe = MoE.from_dense(mlp, num_experts=3, backend=backend, aux_mode="off")
    torch.testing.assert_close(moe(x), mlp(x))
    ours, theirs = (torch.autograd.grad(module(x).square().sum(), x)[0] for module in (moe, mlp))
    torch.testing.assert_close(ours, theirs)
    moe(x).sum().backward()
    assert moe.norm.weight.grad.any()
    assert mlp.layer_norm.weight.grad is None  # a copy
    again = MoE(**moe.config()).double()
    again.load_state_dict(moe.state_dict())
    torch.testing.assert_close(again(x), moe(x))


def test_dense_weights_with_their_layer_norm_are_loaded():
    """As a LLaVA's mm_projector.bin is, after upcycling."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"projector": MoE.from_dense(Normed(), num_experts=3)})
    other, x = Normed(), torch.randn(5, 6)
    holder.load_state_dict({f"projector.{name}": tensor for name, tensor in other.state_dict().items()})
    torch.testing.assert_close(holder["projector"](x), other(x))


def test_a_layer_norm_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="computes something else"):
        MoE.from_dense(Normed(first=False))
    with pytest.raises(ConfigError, match=r"begins with a layer norm, .*MoE\.from_dense keeps it"):
        Experts.from_dense(Normed(), 3)
