"""Expert parallelism: of every layer's N experts, each of P processes holds and runs N / P, for everybody's tokens.

    x [T, D], index, gate weights [T, K] -> gathered: [P*T, ..]     backward: parts [P*T, ..], exchanged and summed
    this process's experts -> its part of all outputs [P*T, O]
    parts, exchanged and summed -> y [T, O]                         backward: gathered

All tokens travel, not each choice to its expert: a token that chose several experts of one process goes there once, no
process has to know what the others' tokens chose, and the order of sums is fixed. That moves (P - 1) T D numbers per
process and direction, where sending choices moves K (P - 1) / P T D: no more where K >= P, as with 8 of 64 experts on 8
GPUs. Parts are added in float32.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from libmoe_fast.errors import ConfigError
from libmoe_fast.experts import Experts, is_sharded
from libmoe_fast.reference import accumulation_dtype
from libmoe_fast.spec import Routing
from libmoe_fast.upcycle import moe_layers


class ParallelExperts(Experts):
    """Process p's experts, p N/P to (p + 1) N/P, of those of a layer: w1 [N/P, H, D] and so on.

    Forward is a collective of `group`: all its processes call it, and backward, equally often. They may have different
    numbers of tokens, 0 among them. A state_dict with all N experts is loaded in part.
    """

    def __init__(self, experts: Experts, group: dist.ProcessGroup, host_group: dist.ProcessGroup) -> None:
        self.group, self.host_group = group, host_group
        self.all_experts = experts.num_experts
        own = experts.num_experts // group.size()
        super().__init__(
            experts.in_features,
            experts.hidden_features,
            experts.out_features,
            num_experts=own,
            activation=experts.activation,
            gated=experts.gated,
            bias=experts.bias,
            device="meta",  # the parameters are replaced below
        )
        self.first = own * group.rank()
        for name, whole in experts.named_parameters():
            part = whole.detach()[self.first : self.first + own].clone()
            setattr(self, name, nn.Parameter(part, requires_grad=whole.requires_grad))
        self.train(experts.training)

    def forward(self, x: Tensor, routing: Routing, backend: str | None = None) -> Tensor:
        """x [T, D] -> [T, O]; `routing` is over all N experts."""
        longest = self._longest(x.shape[0])

        def padded(rows: Tensor, value: float = 0) -> Tensor:  # [T', ..], as long as the longest
            return F.pad(rows, (0, 0, 0, longest - rows.shape[0]), value=value)

        sent = (padded(x), padded(routing.weights))
        tokens, weights = Collective.apply(self.group, gather, exchange_and_sum, *sent)  # [P*T', D], [P*T', K]
        index = gather(padded(routing.index, self.all_experts), self.group) - self.first  # [P*T', K]
        index = torch.where((index >= 0) & (index < self.num_experts), index, self.num_experts)  # others' are free
        # Most choices are others': rows for all of them would take P times the memory.
        y = super().forward(tokens, Routing(index, weights, free=1), backend, counted=True)  # [P*T', O]
        return Collective.apply(self.group, exchange_and_sum, gather, y)[0][: x.shape[0]]

    def _longest(self, tokens: int) -> int:
        """Of all processes' T. The host knows them, so it asks without waiting for the device."""
        lengths = torch.tensor(tokens)
        dist.all_reduce(lengths, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(lengths)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        for name, _ in self.named_parameters():
            key, own = prefix + name, slice(self.first, self.first + self.num_experts)
            if key in state_dict and state_dict[key].shape[:1] == (self.all_experts,):
                state_dict[key] = state_dict[key][own]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.first} to {self.first + self.num_experts - 1} of {self.all_experts}"


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Cuts the experts of every MoE layer among the processes of `group` (None: all), in place; routers stay whole.

    Call it on all processes of the group, on equal models, before the optimizer is made. The gradients of a process's
    experts are then sums over the group's tokens, each scaled as its own process's loss; those of everything else are
    the process's own, as before: average these over all processes, and let a data-parallel wrapper leave the experts
    alone (train/expert_groups.py tells DeepSpeed). `save_model`, called on all processes, writes all N experts.

    Returns: `model`. Raises ConfigError, with nothing changed, where there is no MoE layer, N is no multiple of the
        group's size, or the experts are wrapped, sharded or parallel already.
    """
    group = group or dist.group.WORLD
    layers = moe_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no MoE layers; upcycle it first")
    for name, layer in layers.items():
        experts = layer.experts
        if type(experts) is not Experts or any(map(is_sharded, experts.parameters())):
            raise ConfigError(
                f"the experts of {name} are sharded or wrapped ({type(experts).__name__}); shard_experts takes them as "
                "upcycle and load_model leave them"
            )
        if experts.num_experts % group.size():
            raise ConfigError(
                f"{name} has {experts.num_experts} experts, which {group.size()} processes cannot share evenly; "
                "choose a number of processes that divides it"
            )
    host_group = group
    if dist.get_backend(group) != "gloo":
        ranks = dist.get_process_group_ranks(group)
        host_group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    for layer in layers.values():
        layer.experts = ParallelExperts(layer.experts, group, host_group)
    return model


def parallel_parameters(model: nn.Module) -> dict[str, dist.ProcessGroup]:
    """Dotted names of the parameters that hold a part of the experts -> the group that holds them all."""
    return {
        f"{prefix}.{name}" if prefix else name: module.group
        for prefix, module in model.named_modules()
        if isinstance(module, ParallelExperts)
        for name, _ in module.named_parameters()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Collectives, each the other's transpose


def gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, ..] of every process -> [P*T, ..], in the order of ranks."""
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def exchange_and_sum(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """parts [P*T, ..], T rows for each process -> [T, ..], the sum of those for this one, in the order of ranks."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    received = received.unflatten(0, (group.size(), parts.shape[0] // group.size()))  # [P, T, ..]
    return received.sum(0, dtype=accumulation_dtype(parts.dtype)).to(parts.dtype)


class Collective(torch.autograd.Function):
    """`collective` of several tensors, whose gradients travel back by its transpose, in the same order everywhere."""

    @staticmethod
    def forward(ctx, group, collective: Callable, transpose: Callable, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.back = group, transpose, collective
        return tuple(collective(part, group) for part in parts)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, None, *Collective.apply(*ctx.back, *grads)
