"""MoE = router + experts: the drop-in nn.Module.

    x [..., D] -> router -> (index, gate weights) [T, K] -> experts -> y [..., O]

It takes what a dense MLP takes and returns one tensor of the same dtype. The auxiliary loss rides along on the gate
weights (ops.attach_aux_loss), so training code that only knows `loss.backward()` trains the router correctly.
"""

import contextlib
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from libmoe_fast import loss_scale, ops
from libmoe_fast.errors import ConfigError
from libmoe_fast.experts import Experts, split_norm, stack_dense
from libmoe_fast.routers import build_router, check_router_options, find_router
from libmoe_fast.spec import LossOptions, Routing, check_choice, check_not_negative

# Reentrant checkpointing runs every forward without gradients once, and once more with them: one or two say nothing.
UNTRAINED_FORWARDS = 3
UNTRAINED = """\
this MoE layer is in training mode and has run {count} times in a row without gradients: its experts and router will \
NOT train. Remove torch.no_grad from the forward around it (the original LLaVA's CLIPVisionTower has that decorator, \
in multimodal_encoder/clip_encoder.py), or call eval() if this is no training."""


class MoE(nn.Module):
    """A sparse mixture of experts with O(K) work per token, dropless (LibMoE eq. 1-3).

    Args:
        in_features, hidden_features, out_features: D, H, O of every expert.
        num_experts, top_k: N and K.
        router: a registered name ("smoe", "cosine", "perturbed_cosine", "sigmoid", "hyper"), or "package.module:Class".
        router_options: keyword options of that router.
        activation, gated, bias: of every expert, see Experts.
        balance_coef, z_coef: weights of the balance loss and the z-loss in the auxiliary loss.
        aux_weight: share of this layer's auxiliary loss in the model's; `upcycle` makes it 1 / layers of the tower.
        balance_over: "top1" counts first choices (LibMoE), "topk" all K.
        balance_scope: "sequence" averages the balance loss over sequences [.., S, D]; "batch" takes all tokens as one.
        aux_mode: "attach" (backward adds the auxiliary loss by itself), "return" (forward returns (y, aux_loss) and
            the caller adds it), or "off".
        backend: see ops; None chooses by device.

    After a training forward, `aux_loss`, `balance_loss`, `z_loss` (scalars) and `last_expert_share` ([N], the share of
    the T*K choices that each expert got) hold detached values for logging; they are None before it.
    """

    aux_scale: Tensor  # scale of the task's loss while backward runs, the same scalar for all layers on a device

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        num_experts: int,
        top_k: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool | tuple[bool, bool] = True,
        norm_eps: float | None = None,
        device=None,
        dtype=None,
        **layer_options,
    ) -> None:
        super().__init__()
        norm = None if norm_eps is None else nn.LayerNorm(in_features, norm_eps, device=device, dtype=dtype)
        experts = Experts(
            in_features,
            hidden_features,
            out_features,
            num_experts=num_experts,
            activation=activation,
            gated=gated,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self._assemble(experts, norm, top_k=top_k, **layer_options)

    @classmethod
    def from_dense(cls, mlp: nn.Module, *, num_experts: int = 4, top_k: int = 2, **layer_options) -> "MoE":
        """Upcycles a dense MLP: every expert is a copy, the gate is drawn from N(0, 0.02).

        `mlp` is a CLIPMLP, SiglipMLP, LlavaMultiModalProjector, nn.Sequential(Linear, act, Linear), or a gated Llama
        or Phi-3 MLP, or such a one after a layer norm, which the layer then begins with (VipLLaVA's and InternVL's
        projectors); `layer_options` are those of MoE from `router` on. With weights that sum to 1, which all
        default routers give, the MoE equals `mlp` to rounding. Raises ConfigError for other modules.
        """
        moe = cls.__new__(cls)
        nn.Module.__init__(moe)
        experts, norm = Experts.with_norm(mlp, num_experts)
        moe._assemble(experts, norm, top_k=top_k, **layer_options)
        return moe.train(mlp.training)

    def _assemble(
        self,
        experts: Experts,
        norm: nn.LayerNorm | None,
        *,
        top_k: int,
        router: str = "smoe",
        router_options: dict | None = None,
        balance_coef: float = 0.01,
        z_coef: float = 0.001,
        aux_weight: float = 1.0,
        balance_over: Literal["top1", "topk"] = "top1",
        balance_scope: Literal["sequence", "batch"] = "sequence",
        aux_mode: Literal["attach", "return", "off"] = "attach",
        backend: str | None = None,
    ) -> None:
        check_choice("balance_over", balance_over, ("top1", "topk"))
        check_choice("balance_scope", balance_scope, ("sequence", "batch"))
        check_choice("aux_mode", aux_mode, ("attach", "return", "off"))
        for name, value in {"balance_coef": balance_coef, "z_coef": z_coef, "aux_weight": aux_weight}.items():
            check_not_negative(name, value)
        weight = experts.w1
        check_router_options(router, router_options)
        self.router = build_router(
            router,
            experts.in_features,
            experts.num_experts,
            top_k,
            **find_router(router).fitting(router_options or {}, experts.in_features, experts.out_features),
            device=weight.device,
            dtype=weight.dtype,
        )
        self.experts, self.norm = experts, norm
        # Its own copy: a wrapper around the experts (peft's) has sizes of another meaning.
        self.sizes = {
            "in_features": experts.in_features,
            "hidden_features": experts.hidden_features,
            "out_features": experts.out_features,
            "num_experts": experts.num_experts,
            "activation": experts.activation,
            "gated": experts.gated,
            "bias": list(experts.bias),
            "norm_eps": None if norm is None else norm.eps,
        }
        self.router_name, self.router_options = router, dict(router_options or {})
        self.balance_coef, self.z_coef, self.aux_weight = balance_coef, z_coef, aux_weight
        self.balance_over, self.balance_scope = balance_over, balance_scope
        self.aux_mode, self.backend = aux_mode, backend
        loss_scale.watch()
        self.share_aux_scale()
        self.clear_statistics()
        self._records: list[Routing] | None = None  # a list while record_routing is active
        self._without_grad = 0  # forwards in training mode since one that kept gradients

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., D] -> y [..., O] in the dtype of x (of autocast, where it is on); (y, aux_loss) with "return".

        Raises ConfigError when the last dimension is not D, or the dtype is not the experts'.
        """
        dtype = autocast_dtype(x) or x.dtype
        self._check(x)
        if self.training and not torch.compiler.is_compiling():
            self._notice_no_grad()
        if self.norm is not None:
            x = self.norm(x)
        with autocast_off(x):  # routing stays in float32, as written
            backend = ops.choose_backend(self.backend, x.device, dtype)
            tokens = x.reshape(-1, x.shape[-1])  # [T, D]
            loss_options = self._loss_options(x.shape)
            routing = self.router(tokens, backend=backend, loss_options=loss_options)
            if loss_options is not None:
                routing = ops.with_losses(routing, loss_options, self.router.spec)
                self._log(routing)
            self._record(routing, x.shape)
            y = self.experts(tokens.to(dtype), routing, backend)  # [T, O]
            if routing.free and (free := self.router.free_output(tokens, routing)) is not None:
                y = y + free.to(dtype)
        y = y.view(*x.shape[:-1], y.shape[-1])
        if self.aux_mode == "return":
            total = None if routing.aux is None else routing.aux.total
            return y, routing.probs.new_zeros(()) if total is None else total
        return y

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """What belongs to a dense MLP is loaded into every expert, as `from_dense` copies it; the router stays."""
        if dense := {n: t for n, t in state_dict.items() if n.startswith(prefix)}:
            own, norm = split_norm({name.removeprefix(prefix): tensor for name, tensor in dense.items()})
            if (stacked := stack_dense(own, self.sizes["num_experts"], gated=self.sizes["gated"])) is not None:
                for name in dense:
                    del state_dict[name]
                state_dict.update({f"{prefix}experts.{name}": tensor for name, tensor in stacked.items()})
                state_dict.update({f"{prefix}router.{name}": t for name, t in self.router.state_dict().items()})
                state_dict.update({f"{prefix}norm.{name}": t for name, t in norm.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def clear_statistics(self) -> None:
        """Forgets the logged values, so that a batch that skips this layer cannot report an older one's."""
        self.set_statistics(None, None, None, None)

    def statistics(self) -> tuple[Tensor | None, ...]:
        """The logged values: aux_loss, balance_loss, z_loss, last_expert_share."""
        return self.aux_loss, self.balance_loss, self.z_loss, self.last_expert_share

    def set_statistics(
        self, aux_loss: Tensor | None, balance_loss: Tensor | None, z_loss: Tensor | None, share: Tensor | None
    ) -> None:
        self.aux_loss, self.balance_loss, self.z_loss, self.last_expert_share = aux_loss, balance_loss, z_loss, share

    def config(self) -> dict:
        """Keyword arguments that build a layer like this one (JSON-able); what a checkpoint stores."""
        return {
            **self.sizes,
            "top_k": self.router.spec.top_k,
            "router": self.router_name,
            "router_options": self.router_options,
            "balance_coef": self.balance_coef,
            "z_coef": self.z_coef,
            "aux_weight": self.aux_weight,
            "balance_over": self.balance_over,
            "balance_scope": self.balance_scope,
        }

    def _weight(self) -> Tensor:
        """w1, which peft's wrapper of the experts does not show."""
        experts = self.experts
        return experts.w1 if hasattr(experts, "w1") else experts.get_base_layer().w1

    def _check(self, x: Tensor) -> None:
        width = self.sizes["in_features"]
        if x.ndim == 0 or x.shape[-1] != width:
            raise ConfigError(f"tokens have shape {tuple(x.shape)}, but this MoE takes [..., D] with D = {width}")
        if autocast_dtype(x) is None and x.dtype != self._weight().dtype:
            raise ConfigError(
                f"tokens are {x.dtype}, but the experts are {self._weight().dtype}; "
                "cast one of them, or run under torch.autocast"
            )

    def _notice_no_grad(self) -> None:
        """Seen by running: which towers have a no_grad around them cannot be told from class names."""
        self._without_grad = 0 if torch.is_grad_enabled() else self._without_grad + 1
        if self._without_grad == UNTRAINED_FORWARDS and any(p.requires_grad for p in self.parameters()):
            warnings.warn(UNTRAINED.format(count=UNTRAINED_FORWARDS), stacklevel=3)

    def _loss_options(self, shape: torch.Size) -> LossOptions | None:
        if not self.training or self.aux_mode == "off":
            return None
        attach = self.aux_mode == "attach" and torch.is_grad_enabled()
        if self.aux_scale.device != self._weight().device:  # the weights were replaced one by one, not moved together
            self.share_aux_scale()
        return LossOptions(
            balance_coef=self.balance_coef * self.aux_weight,
            z_coef=self.z_coef * self.aux_weight,
            sequences=max(shape[:-2].numel(), 1) if self.balance_scope == "sequence" else 1,
            over=self.balance_over,
            aux_scale=self.aux_scale if attach else None,
        )

    def _log(self, routing: Routing) -> None:
        if ops.recomputing():  # in backward, which is no new forward; several scales' passes were averaged by then
            return
        # A compiler gives back wrongly what is a view of what it keeps, where a graph ends before the experts.
        kept = Tensor.clone if torch.compiler.is_compiling() else Tensor.detach
        self.set_statistics(*(None if value is None else kept(value.detach()) for value in routing.aux))

    def _record(self, routing: Routing, shape: torch.Size) -> None:
        """Appends the detached routing, with the leading shape of x. Recomputation in backward is not a new forward."""
        if self._records is not None and not ops.recomputing():
            self._records.append(Routing(*(t.detach().view(*shape[:-1], t.shape[-1]) for t in routing[:4])))

    def share_aux_scale(self) -> None:
        """Takes the scalar of the device where the weights are.

        No buffer: one that no checkpoint holds comes out of transformers' from_pretrained with whatever was in memory.
        """
        self.aux_scale = loss_scale.shared(self._weight().device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.share_aux_scale()
        return self

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        loss_scale.watch()  # unpickled, perhaps in a new process
        self.share_aux_scale()  # a copy reads the same scalar, not a copy of it


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast gives linear layers on the device of x; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
