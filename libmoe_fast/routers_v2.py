"""The routers that LibMoE's second version adds to its five: XMoE, shared experts, ternary choices, and MoE++.

They run on the same kernels. What differs from a RouterSpec is made around `ops.route`: a projection before it, an
always chosen expert after it, signs on its weights, choices that no expert has to run.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from libmoe_fast import losses, ops, reference
from libmoe_fast.errors import ConfigError
from libmoe_fast.routers import GATE_STD, Router, register_router
from libmoe_fast.spec import (
    LossOptions,
    RouterSpec,
    Routing,
    check_choice,
    check_not_negative,
    check_positive,
)

CONSTANT_STD = 0.002  # of MoE++'s constants, as LibMoE v2 draws them


@register_router("xmoe")
class XMoERouter(Router):
    """Cosine gate on a low-dimensional hypersphere (Chi et al. 2022): p = softmax(norm cos(P x, w_i) / temperature).

    proj_dim: of the learned projection P; None is N / 2 (Chi et al., section 3.2). norm: of the expert embeddings w_i,
    whatever their length in `weight`. The weights are a softmax of the chosen p, as LibMoE v2 has it.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        proj_dim: int | None = None,
        temperature: float = 0.3,
        norm: float = 1.5,
        device=None,
        dtype=None,
    ) -> None:
        check_positive("temperature", temperature)
        check_positive("norm", norm)
        if proj_dim is not None and not (isinstance(proj_dim, int) and proj_dim >= 1):
            raise ConfigError(f"proj_dim is {proj_dim!r}; it must be at least 1, or None for half the experts")
        proj_dim = proj_dim or max(num_experts // 2, 1)
        self.temperature, self.norm = temperature, norm
        spec = RouterSpec(num_experts=num_experts, top_k=top_k, gate="softmax")
        super().__init__(proj_dim, spec, device=device, dtype=dtype)
        self.projection = nn.Linear(dim, proj_dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Embeddings start at their length, which decides how far a step of an optimiser turns them."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight.copy_(self.norm * F.normalize(self.weight, dim=-1))

    def forward(self, x: Tensor, **context) -> Routing:
        # Recomputed, so that no float32 copy of x is kept.
        x = ops.recomputed(ops.float_linear, x, self.projection.weight)  # [T, proj_dim]
        x = F.normalize(x, dim=-1, eps=1e-4)
        weight = self.norm * F.normalize(self.weight.to(x.dtype), dim=-1)  # [N, proj_dim]
        return ops.route(x, weight, None, spec=self.spec, temperature=self.temperature, **context)


class SharedExpertRouter(Router):
    """One of the N experts, the last, is every token's; K - 1 of the others are chosen.

    A layer's num_experts and top_k count it, so that the work per token is that of the other routers. Weights:

        mix "mean"   y = (shared + routed) / 2, an upcycled layer equals its dense MLP (LibMoE v2)
        mix "sum"    y = shared + scale * routed (DeepSeek-AI 2024)

    In records the shared expert has p = 0 and its share of the choices is 1 / K.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, mix: str, scale: float, device=None, dtype=None, **choice
    ) -> None:
        check_choice("mix", mix, ("mean", "sum"))
        check_positive("scale", scale)
        if num_experts < 2 or top_k < 2:
            raise ConfigError(
                f"num_experts is {num_experts} and top_k {top_k}; with a shared expert both are at least 2, as one of "
                "each is the shared expert"
            )
        self.routed = RouterSpec(num_experts=num_experts - 1, top_k=top_k - 1, **choice)
        super().__init__(dim, self.routed, device=device, dtype=dtype)
        self.spec = dataclasses.replace(
            self.routed, num_experts=num_experts, top_k=top_k, gate="sum" if mix == "mean" else "none"
        )
        self.mix, self.scale = mix, scale

    def forward(self, x: Tensor, *, loss_options: LossOptions | None = None, **context) -> Routing:
        routing = ops.route(x, self.weight, self.bias, spec=self.routed, loss_options=loss_options, **context)
        if loss_options is not None:
            routing = ops.with_losses(routing, loss_options, self.routed)
        return self._with_shared(routing)

    def _with_shared(self, routing: Routing) -> Routing:
        shared, K = self.routed.num_experts, self.spec.top_k
        routed, own = (0.5, 0.5) if self.mix == "mean" else (self.scale, 1.0)
        aux = routing.aux
        if aux is not None:
            aux = aux._replace(share=torch.cat([aux.share * ((K - 1) / K), aux.share.new_full((1,), 1 / K)]))
        return Routing(
            index=F.pad(routing.index, (0, 1), value=shared),  # [T, K]
            weights=F.pad(routing.weights * routed, (0, 1), value=own),
            probs=F.pad(routing.probs, (0, 1)),  # [T, N]
            logits=F.pad(routing.logits, (0, 1), value=float("-inf")),
            aux=aux,
        )


@register_router("shared_v2")
class SharedV2Router(SharedExpertRouter):
    """A shared expert beside a softmax gate over the others (DeepSeek-AI 2024, V2; LibMoE v2's SharedE-V2)."""

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, mix: str = "mean", scale: float = 1.0, device=None, dtype=None
    ) -> None:
        super().__init__(dim, num_experts, top_k, mix=mix, scale=scale, device=device, dtype=dtype)


@register_router("shared_v3")
class SharedV3Router(SharedExpertRouter):
    """A shared expert beside a sigmoid gate, w = p / sum p (DeepSeek-AI 2024, V3; LibMoE v2's SharedE-V3).

    bias_rate: balance without an auxiliary loss (V3, section 2.1.2): experts are chosen by p + b_i, and at every
    `set_training_progress`, that is at every optimiser step of `libmoe-fast train`, b_i rises by bias_rate where expert
    i had fewer tokens than the mean since the last, and falls where it had more; all processes count together. V3 took
    0.001; 0 leaves the biases at zero, as LibMoE does. Set balance_coef to 0 with it.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        mix: str = "mean",
        scale: float = 1.0,
        bias_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        check_not_negative("bias_rate", bias_rate)
        choice = {"probability": "sigmoid", "bias": "selection" if bias_rate else "none"}
        super().__init__(dim, num_experts, top_k, mix=mix, scale=scale, device=device, dtype=dtype, **choice)
        self.bias_rate = bias_rate
        self.load: Tensor | None = None  # [N - 1], tokens of each expert since the last `set_progress`
        if bias_rate:  # no gradient reaches it, and no optimiser should
            del self.bias
            self.register_buffer("bias", torch.zeros(num_experts - 1, device=device))  # [N - 1] float32

    def forward(self, x: Tensor, **context) -> Routing:
        routing = super().forward(x, **context)
        if self.bias_rate and self.training and not ops.recomputing():
            load = losses.hits(routing.index, self.routed.num_experts).sum((0, 1))
            self.load = load + (0 if self.load is None else self.load)
        return routing

    def set_progress(self, step: int, total: int) -> None:
        if not self.bias_rate:
            return
        load = torch.zeros_like(self.bias, dtype=torch.int64) if self.load is None else self.load
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load)
        # Made anew, not in place: a graph that still waits for its backward may hold it.
        self.bias = self.bias + self.bias_rate * (load.float().mean() - load).sign()
        self.load = None

    def _apply(self, fn, recurse=True):
        """The biases stay in float32: bfloat16 would swallow their steps."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias_rate and not (bias.is_meta or self.bias.is_meta):
            self.bias = bias.to(self.bias.device)
        return self


@register_router("tc_moe")
class TCMoERouter(Router):
    """Ternary choices (Yan et al. 2025): an expert may be chosen with sign +1 or -1, or nothing may be.

    The gate has 2 N + K slots: N experts, the same N with their outputs negated, and K null slots. p is a softmax of
    the scores, lowered by 1 for negated experts and by 10 for null slots, so that training starts near an ordinary
    gate. Weights are p over the sum of the chosen p of experts and of all null p; a null choice has weight 0.

    Losses: balance over the N experts, both signs together, null choices left out; z; and -reward times the mean
    probability of null slots. An upcycled layer does not start equal to its dense MLP. A null choice runs no expert (in
    LibMoE v2 it does); its index is N.
    """

    NEGATED, NULL = -1.0, -10.0

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, reward: float = 1e-5, device=None, dtype=None
    ) -> None:
        check_not_negative("reward", reward)
        self.slots = RouterSpec(num_experts=2 * num_experts + top_k, top_k=top_k, bias="score", gate="none")
        super().__init__(dim, dataclasses.replace(self.slots, bias="none"), device=device, dtype=dtype)
        self.spec = RouterSpec(num_experts=num_experts, top_k=top_k, gate="none")
        self.reward = reward

    def forward(self, x: Tensor, *, loss_options: LossOptions | None = None, backend: str | None = None) -> Routing:
        N, K = self.spec.num_experts, self.spec.top_k
        slot = torch.arange(2 * N + K, device=x.device)
        lowered = torch.where(slot < 2 * N, self.NEGATED * (slot >= N), self.NULL)  # [2 N + K]
        # The null slots' probability is part of every weight and has to be learned through: fused routing cannot.
        routing = ops.recomputed(reference.route, x, self.weight, lowered, spec=self.slots)
        positive, negative, null = routing.probs.split([N, N, K], dim=-1)
        chosen = routing.index < 2 * N  # [T, K]
        total = (routing.weights * chosen).sum(-1, keepdim=True) + null.sum(-1, keepdim=True)
        sign = torch.where(routing.index < N, 1.0, -1.0) * chosen
        weights = sign * routing.weights / total.clamp_min(1e-6)
        base = positive + negative  # [T, N]
        probs = base / base.sum(-1, keepdim=True).clamp_min(torch.finfo(base.dtype).tiny)
        index = torch.where(chosen, routing.index % N, N)
        ternary = Routing(index, weights, probs, routing.logits - lowered, free=1)
        if loss_options is not None:  # null choices are nobody's
            reward = self.reward * null.sum(-1).mean() if null.shape[0] else null.sum()
            ternary = ops.with_losses(ternary, loss_options, self.spec, more=-reward)
        return ternary._replace(logits=routing.logits[:, :N])


@register_router("moe_plus_plus")
class MoEPlusPlusRouter(Router):
    """MoE++ (Jin et al. 2025): beside the N experts a token may choose what costs no product of matrices.

        zero      nothing
        copy      x
        constant  a x + b v, v learned and (a, b) = softmax(W x) (eq. 5)

    The gate is a softmax over all slots: experts, zeros, copies, constants. The weights of the K chosen are divided by
    their sum. Defaults are LibMoE v2's: a zero and a constant; the balance loss is over all slots, and counts the terms
    of zeros zero_factor times. Where the layer returns other features than it takes there are experts only, as there.
    An upcycled layer does not start equal to its dense MLP. In records, slots after the experts are numbered from N.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        zeros: int = 1,
        copies: int = 0,
        constants: int = 1,
        zero_factor: float = 1.3,
        device=None,
        dtype=None,
    ) -> None:
        for name, number in {"zeros": zeros, "copies": copies, "constants": constants}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ConfigError(f"{name} is {number!r}; it must be a whole number of at least 0")
        check_not_negative("zero_factor", zero_factor)
        self.free = zeros + copies + constants
        self.routed = RouterSpec(num_experts=num_experts + self.free, top_k=top_k, gate="sum")
        super().__init__(dim, self.routed, device=device, dtype=dtype)
        self.spec = RouterSpec(num_experts=num_experts, top_k=top_k, gate="none" if self.free else "sum")
        self.zeros, self.copies, self.constants, self.zero_factor = zeros, copies, constants, zero_factor
        if constants:
            self.constant = nn.Parameter(torch.empty(constants, dim, device=device, dtype=dtype))  # v
            self.mix = nn.Parameter(torch.empty(constants, 2, dim, device=device, dtype=dtype))  # W
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "mix"):
            nn.init.normal_(self.constant, std=CONSTANT_STD)
            nn.init.normal_(self.mix, std=GATE_STD)

    @classmethod
    def fitting(cls, options: dict, in_features: int, out_features: int) -> dict:
        none = {} if in_features == out_features else {"zeros": 0, "copies": 0, "constants": 0}
        return {**options, **none}

    def forward(self, x: Tensor, *, loss_options: LossOptions | None = None, backend: str | None = None) -> Routing:
        N = self.spec.num_experts
        if loss_options is None or not self.zeros or self.zero_factor == 1:
            routing = ops.route(x, self.weight, spec=self.routed, loss_options=loss_options, backend=backend)
            if loss_options is not None:
                routing = ops.with_losses(routing, loss_options, self.routed)
        else:  # fused routing weighs all slots alike
            routing = ops.recomputed(reference.route, x, self.weight, spec=self.routed)
            slot = torch.arange(N + self.free, device=x.device)
            factor = torch.where((slot >= N) & (slot < N + self.zeros), self.zero_factor, 1.0)
            weighed = ops.with_losses(
                routing._replace(probs=routing.probs * factor.to(routing.probs.dtype)), loss_options, self.routed
            )
            routing = weighed._replace(probs=routing.probs)
        aux = routing.aux and routing.aux._replace(share=routing.aux.share[:N])
        return routing._replace(aux=aux, free=self.free)

    def free_output(self, x: Tensor, routing: Routing) -> Tensor | None:
        if not self.copies and not self.constants:
            return None
        first = self.spec.num_experts + self.zeros
        parts = (self.constant, self.mix) if self.constants else (None, None)
        return ops.recomputed(_free_output, x, routing.index - first, routing.weights, self.copies, *parts)


def _free_output(
    x: Tensor, slot: Tensor, weights: Tensor, copies: int, constant: Tensor | None, mix: Tensor | None
) -> Tensor:
    """[T, D] in the dtype of x. slot [T, K]: a copy's from 0 on, then a constant's; negative ones are others'."""
    dtype = reference.accumulation_dtype(x.dtype)
    share = (weights * ((slot >= 0) & (slot < copies))).sum(-1, keepdim=True)  # of x [T, 1]
    if constant is None:
        return (share * x).to(x.dtype)
    J = constant.shape[0]
    chosen = (weights.unsqueeze(-1) * losses.hits(slot - copies, J)).sum(1)  # [T, J]
    mixed = ops.float_linear(x, mix.flatten(0, 1)).unflatten(-1, (J, 2)).softmax(-1)  # [T, J, 2]
    of_x, of_constant = (chosen.unsqueeze(-1) * mixed).unbind(-1)  # [T, J]
    share = share + of_x.sum(-1, keepdim=True)
    return (share * x + of_constant @ constant.to(dtype)).to(x.dtype)
