"""Tiny MoE models and experts modules of transformers, for the tests of libmoe_fast.huggingface."""

from types import SimpleNamespace

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AriaTextConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.models.aria.modeling_aria import AriaTextForCausalLM

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

# One model for each way in which a model uses its experts.
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(  # gate weights that do not sum to 1, and shared experts beside ours
        **SIZES, moe_intermediate_size=20, shared_expert_intermediate_size=12, num_experts=6, num_experts_per_tok=3
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(  # the first layer is dense
        **SIZES,
        intermediate_size=16,
        moe_intermediate_size=12,
        head_dim=12,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        mlp_only_layers=[0],
    ),
    "olmoe": lambda: OlmoeConfig(  # another activation, and K = N
        **SIZES, intermediate_size=12, num_experts=4, num_experts_per_tok=4, hidden_act="gelu_pytorch_tanh"
    ),
    "nemotron_h": lambda: NemotronHConfig(  # experts without a gate
        **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
        layers_block_type=["moe", "attention", "moe"],
        mlp_hidden_act="relu",
        head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=12,
    ),
    "gpt_oss": lambda: GptOssConfig(  # transposed, interleaved, biased, clamped
        **SIZES, intermediate_size=12, head_dim=12, num_local_experts=4, num_experts_per_tok=2
    ),
}
if Version(transformers.__version__) >= Version("5.18"):  # before, its experts were not on the interface
    CONFIGS["aria"] = lambda: AriaTextConfig(  # transposed weights
        **SIZES, intermediate_size=20, moe_num_experts=5, moe_topk=2, moe_num_shared_experts=1
    )


def tiny_model(name: str, implementation: str) -> PreTrainedModel:
    """With weights large enough that the experts matter for the logits."""
    torch.manual_seed(0)
    cls = AriaTextForCausalLM if name == "aria" else AutoModelForCausalLM
    make = getattr(cls, "from_config", None) or cls._from_config
    model = make(CONFIGS[name](), experts_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run_model(model: PreTrainedModel) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter, for a batch of 2 x 5 tokens."""
    ids = torch.randint(2, SIZES["vocab_size"], (2, 5), generator=torch.Generator().manual_seed(1)).to(model.device)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    model.zero_grad()
    output.loss.backward()
    grads = {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


def make_experts(
    *,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    bias: bool = False,
    act: str | nn.Module = "silu",
    gate=None,
    extra: dict[str, nn.Parameter] | None = None,
    post_norm: bool = False,
    sizes: tuple[int, int, int] = (5, 12, 20),
) -> nn.Module:
    """An experts module of our own in a layout that transformers' decorator offers; `gate` replaces act(gate) * up."""
    N, H, D = sizes

    class Experts(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            up_rows = 2 * H if gated else H
            first = "gate_up_proj" if gated else "up_proj"
            shapes = {first: (up_rows, D), "down_proj": (D, H)}
            for name, shape in shapes.items():
                stored = shape[::-1] if transposed else shape
                setattr(self, name, nn.Parameter(torch.randn(N, *stored) * 0.3))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(N, shape[0])))
            self.num_experts = N
            self.act_fn = ACT2FN[act] if isinstance(act, str) else act
            for name, parameter in (extra or {}).items():
                setattr(self, name, parameter)

        if interleaved:

            def _apply_gate(self, rows):
                return self.act_fn(rows[..., ::2]) * rows[..., 1::2]

        elif gate is not None:

            def _apply_gate(self, rows):
                return gate(*rows.chunk(2, dim=-1))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError("the tests run implementations of the interface")

    decorated = use_experts_implementation(
        is_concatenated=not interleaved,
        is_transposed=transposed,
        has_bias=bias,
        has_gate=gated,
        **({"has_post_expert_norm": True} if post_norm else {}),  # since transformers 5.20
    )(Experts)
    torch.manual_seed(0)
    return decorated(SimpleNamespace(_experts_implementation="libmoe_fast"))


def choices(tokens: int, sizes: tuple[int, int, int] = (5, 12, 20), top_k: int = 2) -> tuple[Tensor, ...]:
    """x [T, D], index [T, K], gate weights [T, K], drawn from a generator of their own."""
    N, _, D = sizes
    generator = torch.Generator().manual_seed(2)
    index = torch.rand(tokens, N, generator=generator).argsort(-1)[:, :top_k]
    return torch.randn(tokens, D, generator=generator), index, torch.rand(tokens, top_k, generator=generator)


def run_experts(module: nn.Module, implementation: str, x, index, weights) -> dict[str, Tensor]:
    """Output, and the gradients of tokens, gate weights and parameters."""
    module.config._experts_implementation = implementation
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    module.zero_grad()
    y = module(x, index, weights)
    y.sin().sum().backward()
    grads = {f"d {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad, **grads}


def error(results: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of all tensors together, each relative to its own norm, so that none hides behind another."""
    assert results.keys() == truth.keys()
    relative = [
        (results[k].double() - t.double()).norm() / t.double().norm().clamp_min(1e-30) for k, t in truth.items()
    ]
    return float(torch.stack(relative).square().mean().sqrt())


def assert_equal(results: dict[str, Tensor], truth: dict[str, Tensor], *, rounded: bool = False) -> None:
    """float64 results equal to rounding; `rounded` where transformers itself goes through float32 on the way."""
    assert results.keys() == truth.keys()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if rounded else {"rtol": 1e-9, "atol": 1e-11}
    for name, expected in truth.items():
        torch.testing.assert_close(results[name], expected, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
