"""What one would use instead: other ways to run the experts, each standing in for `MoE.experts`.

An adapter takes our Experts, keeps the same weights in the layout that its method uses in practice, and runs the same
routing: only the engine differs. `add_peer(moe, "loop")` gives a layer with our router and its experts. Parity of
output and gradients with our own is tested for every adapter that can run.

    loop            LibMoE's way (arXiv 2411.00918, section 3): for each expert, its tokens, its MLP, a weighted add
    split           tokens sorted by expert, one MLP call per slice, results added back
    grouped_mm      tokens sorted by expert, torch's grouped GEMM
    hf_eager, hf_grouped_mm, hf_batched_mm, hf_sonicmoe     the implementations of transformers' experts interface;
                    hf_sonicmoe is SonicMoE's kernel (arXiv 2512.14080), through the package `kernels`
    st_moe          st-moe-pytorch: one-hot dispatch and combine tensors (GShard), with room for every token
    megablocks      dropless MoE on grouped GEMMs (arXiv 2211.15841)
    scattermoe      ScatterMoE's Triton kernels (arXiv 2403.08245)
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.errors import BackendError
from libmoe_fast.experts import Experts
from libmoe_fast.layer import MoE
from libmoe_fast.reference import ACTIVATIONS, accumulation_dtype, activate
from libmoe_fast.spec import Routing

PARAMETERS = ("w1", "bias1", "w2", "bias2")  # of Experts

# A peer that copies weights or builds one-hot tensors is left out of a case where these alone pass this size.
TEMPORARY_LIMIT = 4 * 2**30

PEERS: dict[str, type[Peer]] = {}


def add_peer(moe: MoE, name: str) -> MoE:
    """`moe` with a copy of its router, routing in plain PyTorch, and its experts run by peer `name`.

    The peer's parameters are its own, but most share their memory with those of `moe`. Raises BackendError where that
    peer cannot run here.
    """
    if reason := PEERS[name].missing():
        raise BackendError(f"benchmark peer {name!r} cannot run here: {reason}")
    other = copy.deepcopy(moe, {id(moe.experts): moe.experts})  # the experts themselves are not copied
    other.experts = PEERS[name](moe.experts)
    other.backend = "reference"  # a fused backend's routing also prepares our own experts' work
    other.router.register_forward_pre_hook(widen)
    return other


def widen(router: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tokens in float32, as plain PyTorch routes them: our `reference` would route 16-bit ones twice, to keep less."""
    x, *rest = inputs
    return (x.to(accumulation_dtype(x.dtype)), *rest)


def why_not(name: str, case: Case) -> str | None:
    """Why peer `name` cannot run `case` here; None if it can."""
    return PEERS[name].missing() or PEERS[name].refuses(case)


def register(name: str):
    def add(cls: type[Peer]) -> type[Peer]:
        PEERS[name] = cls
        return cls

    return add


class Peer(nn.Module):
    """Base of the adapters: stands in for Experts in MoE.forward."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        for name in ("in_features", "hidden_features", "out_features", "num_experts", "activation", "gated", "bias"):
            setattr(self, name, getattr(experts, name))

    @staticmethod
    def missing() -> str | None:
        """What it lacks on this machine, and how to get it."""
        return None

    @staticmethod
    def refuses(case: Case) -> str | None:
        """What of the case it cannot do."""
        return None

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        """x [T, D] -> [T, O], as Experts.forward; `backend` is not for peers."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        """Gradients in our layout: PARAMETERS, those that there are."""
        raise NotImplementedError


class PerExpert(Peer):
    """N separate MLPs, as an nn.ModuleList of experts holds them: gradients of one do not touch the others'."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        for name in PARAMETERS:
            stacked = getattr(experts, name)
            rows = () if stacked is None else stacked.detach().unbind()
            setattr(self, f"all_{name}", nn.ParameterList(nn.Parameter(row) for row in rows))

    @property
    def w1(self) -> Tensor:
        return self.all_w1[0]  # MoE reads dtype and device from it

    def mlp(self, e: int, x: Tensor) -> Tensor:
        """x [rows, D] -> [rows, O] by expert e."""
        b1, b2 = (biases[e] if len(biases) else None for biases in (self.all_bias1, self.all_bias2))
        z = F.linear(x, self.all_w1[e], b1)
        return F.linear(activate(z, self.activation, self.gated), self.all_w2[e], b2)

    def gradients(self) -> dict[str, Tensor]:
        lists = {name: getattr(self, f"all_{name}") for name in PARAMETERS}
        return {
            name: torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            for name, parameters in lists.items()
            if len(parameters)
        }


@register("loop")
class Loop(PerExpert):
    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        weights = routing.weights.to(x.dtype)
        y = x.new_zeros(x.shape[0], self.out_features)
        for e in range(self.num_experts):
            token, choice = torch.where(routing.index == e)
            y[token] += weights[token, choice].unsqueeze(1) * self.mlp(e, x[token])
        return y


@register("split")
class Split(PerExpert):
    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        flat = routing.index.flatten()
        order = flat.argsort(stable=True)
        token = order // routing.index.shape[1]
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        parts = [self.mlp(e, rows) for e, rows in enumerate(x[token].split(counts)) if rows.shape[0]]
        y = torch.cat(parts) * routing.weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return x.new_zeros(x.shape[0], self.out_features).index_add(0, token, y)


class Stacked(Peer):
    """Weights stacked as ours are."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        for name in PARAMETERS:
            stacked = getattr(experts, name)
            self.register_parameter(name, None if stacked is None else nn.Parameter(stacked.detach()))

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.named_parameters()}


@register("grouped_mm")
class GroupedMM(Stacked):
    @staticmethod
    def missing() -> str | None:
        return None if hasattr(F, "grouped_mm") else "torch.nn.functional.grouped_mm came with torch 2.10"

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        flat = routing.index.flatten()
        order = flat.argsort(stable=True)
        expert = flat[order]
        ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).int()  # [N]
        z = F.grouped_mm(x[order // routing.index.shape[1]], self.w1.transpose(1, 2), offs=ends)  # [T*K, H or 2H]
        if self.bias1 is not None:
            z = z + self.bias1[expert]
        y = F.grouped_mm(activate(z, self.activation, self.gated), self.w2.transpose(1, 2), offs=ends)  # [T*K, O]
        if self.bias2 is not None:
            y = y + self.bias2[expert]
        y = y * routing.weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return y[order.argsort()].view(x.shape[0], -1, self.out_features).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


class HuggingFace(Stacked):
    """A module of transformers' experts interface, `implementation` naming the one of its functions that runs."""

    implementation: str

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        from transformers.integrations.moe import use_experts_implementation

        decorate = use_experts_implementation(has_gate=self.gated, has_bias=any(self.bias))
        # Gated GeLU experts call their gate "gelu" too; sonic-moe reads the name.
        config = SimpleNamespace(_experts_implementation=self.implementation, hidden_act=self.activation)
        self.inner = decorate(type("Experts", (_HuggingFaceExperts,), {}))(config, self)

    @staticmethod
    def missing() -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed; pip install 'transformers>=5'"
        from transformers import integrations

        if not hasattr(integrations, "use_experts_implementation"):
            return "its experts interface came with transformers 5; pip install 'transformers>=5'"
        return None

    @staticmethod
    def refuses(case: Case) -> str | None:
        if case.shape.in_features != case.shape.out_features:
            return "transformers' experts return as many features as they take"
        return None

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        return self.inner(x, routing.index, routing.weights.to(x.dtype))

    def gradients(self) -> dict[str, Tensor]:
        return {name: grad for name, grad in super().gradients().items() if not name.startswith("inner.")}


class _HuggingFaceExperts(nn.Module):
    """An experts module as transformers' models define theirs; forward is what "eager" runs."""

    def __init__(self, config: SimpleNamespace, weights: Stacked) -> None:
        super().__init__()
        first = "gate_up_proj" if weights.gated else "up_proj"
        for name, parameter in ((first, weights.w1), ("down_proj", weights.w2)):
            setattr(self, name, parameter)
        for name, parameter in ((f"{first}_bias", weights.bias1), ("down_proj_bias", weights.bias2)):
            setattr(self, name, parameter)
        self.num_experts, self.act_fn = weights.num_experts, ACTIVATIONS[weights.activation]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        result = torch.zeros_like(hidden_states)
        with torch.no_grad():
            mask = F.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)  # [N, K, T]
            hit = mask.sum(dim=(-1, -2)).nonzero().flatten()
        for e in hit:
            choice, token = torch.where(mask[e])
            biases = (getattr(self, f"{name}_bias") for name in (first, "down_proj"))
            b1, b2 = (None if bias is None else bias[e] for bias in biases)
            z = F.linear(hidden_states[token], getattr(self, first)[e], b1)
            a = self._apply_gate(z) if self.has_gate else self.act_fn(z)
            y = F.linear(a, self.down_proj[e], b2) * top_k_weights[token, choice, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


@register("hf_eager")
class HuggingFaceEager(HuggingFace):
    implementation = "eager"


@register("hf_grouped_mm")
class HuggingFaceGroupedMM(HuggingFace):
    implementation = "grouped_mm"


@register("hf_batched_mm")
class HuggingFaceBatchedMM(HuggingFace):
    implementation = "batched_mm"

    @staticmethod
    def refuses(case: Case) -> str | None:
        copied = case.tokens * case.shape.top_k * case.experts_bytes() // case.shape.num_experts
        if copied > TEMPORARY_LIMIT:
            return f"it copies the weights once per choice, here {copied / 2**30:.0f} GiB"
        return HuggingFace.refuses(case)


@register("hf_sonicmoe")
class SonicMoE(HuggingFace):
    implementation = "sonicmoe"

    @staticmethod
    def missing() -> str | None:
        if reason := HuggingFace.missing():
            return reason
        try:
            from transformers.integrations.sonicmoe import is_sonicmoe_loadable

            is_sonicmoe_loadable(raise_error=True)
        except ImportError as error:
            return " ".join(str(error).split())
        return None

    @staticmethod
    def refuses(case: Case) -> str | None:
        if not case.shape.gated or case.dtype != "bf16":
            return "SonicMoE runs gated experts in bf16"
        return HuggingFace.refuses(case)


# ---------------------------------------------------------------------------------------------------------------------
# Packages of their own


class _SliceOfPeer(nn.Module):
    """One expert of a PerExpert as a module, for packages that take a list of modules. Registers no parameter."""

    def __init__(self, peer: PerExpert, e: int) -> None:
        super().__init__()
        self.mlp = lambda x: peer.mlp(e, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@register("st_moe")
class STMoE(PerExpert):
    """Its MoE with its gate replaced: dispatch and combine tensors [1, T, N, C] come from the routing, C being the
    busiest expert's count, so that none is dropped."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # beartype's, about the package's own type hints
            from st_moe_pytorch import MoE as Package

        modules = nn.ModuleList(_SliceOfPeer(self, e) for e in range(self.num_experts))
        self.package = Package(self.in_features, num_experts=self.num_experts, experts=modules, is_distributed=False)
        self.package.gate = self.one_hot = _OneHotDispatch(self.num_experts)

    @staticmethod
    def missing() -> str | None:
        return None if importlib.util.find_spec("st_moe_pytorch") else "not installed; pip install st-moe-pytorch"

    @staticmethod
    def refuses(case: Case) -> str | None:
        if case.shape.in_features != case.shape.out_features:
            return "st-moe-pytorch's experts return as many features as they take"
        shape = case.shape
        capacity = case.tokens * shape.top_k // shape.num_experts
        one_hot = case.tokens * shape.num_experts * capacity * 4  # float32; two such tensors and their gradients
        if 4 * one_hot > TEMPORARY_LIMIT:
            return f"its one-hot dispatch tensors would take {4 * one_hot / 2**30:.0f} GiB"
        return None

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        self.one_hot.routing = routing
        return self.package(x.unsqueeze(0)).outputs.squeeze(0)


class _OneHotDispatch(nn.Module):
    """What st-moe-pytorch's own gate gives its layer: where each choice sits in its expert's batch, as one-hot."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.routing = num_experts, None

    def forward(self, x: Tensor, **_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index, weights = self.routing.index, self.routing.weights.to(x.dtype)
        chosen = F.one_hot(index, self.num_experts)  # [T, K, N]
        flat = chosen.flatten(0, 1)
        position = ((flat.cumsum(0) - 1) * flat).sum(-1).view_as(index)  # [T, K]
        capacity = int(flat.sum(0).max())
        slot = F.one_hot(position, capacity).to(x.dtype)  # [T, K, C]
        chosen = chosen.to(x.dtype)
        combine = torch.einsum("tkn,tkc->tnc", chosen * weights.unsqueeze(-1), slot).unsqueeze(0)
        with torch.no_grad():
            dispatch = torch.einsum("tkn,tkc->tnc", chosen, slot).unsqueeze(0)
        zero = x.new_zeros(())
        return dispatch, combine, zero, zero


def _needs_cuda(module: str, install: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"not installed; {install}"
    return None if torch.cuda.is_available() else "it needs a CUDA GPU"


def _plain_square(case: Case) -> str | None:
    """Why a case is beyond kernels for experts without biases that return as many features as they take."""
    shape = case.shape
    if shape.bias:
        return "its experts have no biases"
    return None if shape.in_features == shape.out_features else "its experts return as many features as they take"


@register("megablocks")
class MegaBlocks(Peer):
    """megablocks' ParallelDroplessMLP, the engine of its dMoE, with mlp_impl="grouped"."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        dtype = experts.w1.dtype
        self.top_k = None
        self.make = lambda top_k: ParallelDroplessMLP(
            Arguments(
                hidden_size=self.in_features,
                ffn_hidden_size=self.hidden_features,
                moe_num_experts=self.num_experts,
                moe_top_k=top_k,
                moe_loss_weight=0,  # the auxiliary loss is the router's, not the engine's
                activation_fn=ACTIVATIONS[self.activation],
                mlp_type="glu" if self.gated else "mlp",
                mlp_impl="grouped",
                bias=False,
                return_bias=False,
                bf16=dtype is torch.bfloat16,
                fp16=dtype is torch.float16,
                device=experts.w1.device,
            )
        )
        self.inner = self.make(1)
        mlp = self.inner.mlp
        rows = experts.w1.detach().chunk(2, dim=1) if self.gated else (experts.w1.detach(),)
        targets = (mlp.w1, mlp.v1) if self.gated else (mlp.w1,)
        with torch.no_grad():
            for target, source in zip(targets, rows, strict=True):
                target.copy_(source.reshape_as(target))  # [N*H, D]
            mlp.w2.copy_(experts.w2.transpose(1, 2).reshape_as(mlp.w2))  # [N*H, D]

    @staticmethod
    def missing() -> str | None:
        return _needs_cuda("megablocks", "pip install 'megablocks[gg]'")

    @staticmethod
    def refuses(case: Case) -> str | None:
        return _plain_square(case) or ("megablocks' grouped GEMM runs in bf16" if case.dtype != "bf16" else None)

    @property
    def w1(self) -> Tensor:
        return self.inner.mlp.w1

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        if self.top_k != routing.index.shape[1]:  # the engine is built for one K
            self.top_k = routing.index.shape[1]
            engine = self.make(self.top_k)
            engine.mlp = self.inner.mlp
            self.inner = engine
        weights = routing.weights.to(x.dtype)
        return self.inner(x.unsqueeze(1), routing.probs, weights, routing.index).view_as(x)

    def gradients(self) -> dict[str, Tensor]:
        mlp, n = self.inner.mlp, self.num_experts
        first = [mlp.w1.grad, mlp.v1.grad] if self.gated else [mlp.w1.grad]
        w1 = torch.cat([grad.view(n, -1, self.in_features) for grad in first], dim=1)  # [N, H or 2H, D]
        return {"w1": w1, "w2": mlp.w2.grad.view(n, -1, self.out_features).transpose(1, 2)}


@register("scattermoe")
class ScatterMoE(Peer):
    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        from scattermoe.mlp import GLUMLP, MLP

        # K is an argument of each call inside; the layer only remembers it.
        self.inner = (GLUMLP if self.gated else MLP)(
            input_size=self.in_features,
            hidden_size=self.hidden_features,
            num_experts=self.num_experts,
            top_k=1,
            activation=ACTIVATIONS[self.activation],
        ).to(experts.w1.device, experts.w1.dtype)
        with torch.no_grad():
            self.inner.experts.weight.copy_(self.swapped(experts.w1.detach()))
            self.inner.output_experts.weight.copy_(experts.w2)

    @staticmethod
    def missing() -> str | None:
        return _needs_cuda("scattermoe", "pip install git+https://github.com/shawntan/scattermoe")

    @staticmethod
    def refuses(case: Case) -> str | None:
        return _plain_square(case)

    @property
    def w1(self) -> Tensor:
        return self.inner.experts.weight

    def swapped(self, w1: Tensor) -> Tensor:
        """Between our rows (gate, up) and its rows (up, gate); [N, 2H, D]."""
        return torch.cat(w1.chunk(2, dim=1)[::-1], dim=1) if self.gated else w1

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        self.inner.top_k = routing.index.shape[1]
        return self.inner(x, routing.weights.to(x.dtype), routing.index)

    def gradients(self) -> dict[str, Tensor]:
        return {"w1": self.swapped(self.inner.experts.weight.grad), "w2": self.inner.output_experts.weight.grad}
