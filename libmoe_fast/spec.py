"""What a router is, as data: the choices that a kernel specialises on, and what routing returns.

score -> probability p -> selection score s -> top-K of s (ties: lowest index) -> gate weights w
"""

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, get_args, get_type_hints

from torch import Tensor

from libmoe_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The routing pipeline of one router. Hashable: fused kernels take it as their compile-time arguments.

    score        "linear"  x . w_i
                 "cosine"  x . w_i / ((norm x + tau) (norm w_i + tau))
    bias         where b_i enters: "none", "score" (before p) or "selection" (s = p + b_i)
    probability  p from the scores: "softmax" of score / temperature, "sigmoid", "softmax_sigmoid" (softmax of the
                 sigmoids), or "identity"
    gate         w over the chosen experts: "sum" (p / sum p), "softmax" (of s), or "none" (p as it is)
    noise        training noise on the score: "off", "gaussian" (noise_std), or "learned" (noisy top-k)
    aux          whether balance and z loss apply to this router
    """

    num_experts: int
    top_k: int
    score: Literal["linear", "cosine"] = "linear"
    tau: float = 0.0
    bias: Literal["none", "score", "selection"] = "none"
    probability: Literal["softmax", "sigmoid", "softmax_sigmoid", "identity"] = "softmax"
    gate: Literal["sum", "softmax", "none"] = "sum"
    noise: Literal["off", "gaussian", "learned"] = "off"
    noise_std: float = 0.0
    aux: bool = True
    # "num_experts=4 top_k=2 ...": as an argument of a torch op, which takes no dataclass. Made once, for torch.compile.
    encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_size("num_experts", self.num_experts)
        check_size("top_k", self.top_k)
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k is {self.top_k} with num_experts {self.num_experts}; choose 1 <= top_k <= num_experts"
            )
        for name, hint in get_type_hints(type(self)).items():
            if choices := get_args(hint):
                check_choice(name, getattr(self, name), choices)
        for name in ("tau", "noise_std"):
            check_not_negative(name, getattr(self, name))
        words = (f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.init)
        object.__setattr__(self, "encoded", " ".join(words))

    @property
    def weights_sum_to_one(self) -> bool:
        """Whether the gate weights of a token sum to 1, so that an upcycled layer equals its dense MLP."""
        return self.gate != "none"


@functools.cache
def decode_spec(encoded: str) -> RouterSpec:
    """The RouterSpec whose `encoded` this is."""
    readers = {int: int, float: float, bool: "True".__eq__}
    hints = get_type_hints(RouterSpec)
    words = (word.split("=") for word in encoded.split())
    return RouterSpec(**{name: readers.get(hints[name], str)(value) for name, value in words})


def routed_shapes(spec: RouterSpec, tokens: int, noisy: bool) -> dict[str, tuple[int, ...] | None]:
    """Shapes of what fused routing keeps for backward; None for what the spec has no use for. index is int64, the
    others are in the dtype that sums are kept in. `noisy`: whether there is noise."""
    cosine, every = spec.score == "cosine", (tokens, spec.num_experts)
    return {
        "index": (tokens, spec.top_k),
        "weights": (tokens, spec.top_k),
        "probs": every,
        "logits": every,
        "x_norm": (tokens,) if cosine else None,  # tau included
        "w_norm": (spec.num_experts,) if cosine else None,
        "cosines": every if cosine else None,
        "noise_scale": every if noisy and spec.noise == "learned" else None,
    }


class Dispatch(NamedTuple):
    """The T*K choices sorted by expert (stable): choice t*K + k is token t's k-th expert.

    order    [T*K] int64   sorted position -> choice
    inverse  [T*K] int64   choice -> sorted position
    offsets  [N+1] int64   expert e owns sorted positions offsets[e]:offsets[e+1]; [N+free+1] with free choices
                           (of which order may have one for all, see fused.counted)
    rows     [T*K, D]      stands for the tokens in sorted order. No memory behind it: experts gather from x in the
                           load, and only its gradient is real, which lets routing's backward sum over K. Or None
    tokens                 the x that `rows` stands for
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    rows: Tensor | None = None
    tokens: Tensor | None = None


class AuxLosses(NamedTuple):
    """Auxiliary losses of one forward: scalars, None for a router without them; share [N] of the T*K choices."""

    total: Tensor | None  # balance_coef * balance + z_coef * z
    balance: Tensor | None
    z: Tensor | None
    share: Tensor


class Routing(NamedTuple):
    """Where every token goes. T tokens keep their leading shape in records.

    index    [T, K] int64   chosen experts, best first
    weights  [T, K] float32 gate weights (float64 for float64 tokens)
    probs    [T, N] float32 p, before any selection bias
    logits   [T, N] float32 what the z-loss is taken of: the scores (their sigmoids where p is made of those)
    aux, dispatch           what a backend's fused routing made along the way, else None
    free                    how many things may be chosen beside the N experts, by an index of N and above: they run no
                            expert, and cost nothing

    probs and logits are for losses and records; experts need only index and weights. Fused backends make the losses
    themselves and give probs and logits no gradient: a router that trains on them takes `reference.route`.
    """

    index: Tensor
    weights: Tensor
    probs: Tensor | None = None
    logits: Tensor | None = None
    aux: AuxLosses | None = None
    dispatch: Dispatch | None = None
    free: int = 0


class LossOptions(NamedTuple):
    """What a forward wants of the auxiliary losses.

    sequences    how many equally long sequences the tokens are, for the balance loss
    over         "top1" or "topk": which choices the balance loss counts
    aux_scale    scalar float32: attach the loss to the gate weights, scaled by this in backward; None does not attach
    """

    balance_coef: float
    z_coef: float
    sequences: int = 1
    over: str = "top1"
    aux_scale: Tensor | None = None


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if not isinstance(value, str | bool) or value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}")


LARGEST_SIZE = 2**31 - 1  # of one side of a tensor


def check_size(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a whole number that a side of a tensor can have."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")


def check_not_negative(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value!r}; it must be a finite number of at least 0")


def check_positive(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}; it must be a positive number")
