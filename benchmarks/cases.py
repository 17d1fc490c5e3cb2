"""What is measured: shapes, cases, and the presets that `libmoe-fast bench` and the pytest suite choose from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import torch

from libmoe_fast.errors import ConfigError
from libmoe_fast.routers import COMPARED

MODES = ("inference", "fwd", "fwd+bwd")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SUBJECTS = ("routing", "permutation", "experts", "layer", "encoder", "training")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a layer (D, H, O, N, K) and what its experts compute."""

    name: str
    in_features: int
    hidden_features: int
    out_features: int
    num_experts: int = 4
    top_k: int = 2
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True

    @property
    def sizes(self) -> str:
        return ", ".join(
            f"{letter} {size}"
            for letter, size in zip(
                "DHONK",
                (self.in_features, self.hidden_features, self.out_features, self.num_experts, self.top_k),
                strict=True,
            )
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One contest.

    sweep   the letter (T, N, K, H) that a growth series varies
    peers   who takes part beside ours, of experts and layer; None: all that can, and a memory copy
    """

    subject: str
    shape: Shape
    tokens: int
    dtype: str = "bf16"
    mode: str = "fwd+bwd"
    router: str = "smoe"
    sweep: str | None = None
    peers: tuple[str, ...] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def id(self) -> str:
        parts = [self.subject, self.shape.name, f"T{self.tokens}", self.dtype, self.mode]
        parts += [self.router] * (self.subject in ("routing", "layer"))
        if self.sweep:
            parts.append(f"sweep-{self.sweep}{self.value(self.sweep)}")
        return "-".join(parts)

    def value(self, letter: str) -> int:
        """The size that `letter` stands for."""
        shape = self.shape
        return {"T": self.tokens, "N": shape.num_experts, "K": shape.top_k, "H": shape.hidden_features}[letter]

    def experts_bytes(self) -> int:
        """Bytes of all experts' weights."""
        shape = self.shape
        first = shape.hidden_features * shape.in_features * (2 if shape.gated else 1)
        return shape.num_experts * (first + shape.out_features * shape.hidden_features) * self.torch_dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Cases and how long each may take: as many rounds as fit into `seconds`, within bounds.

    patience   a peer whose run takes longer, in seconds, and FAR_BEHIND times as long as ours, is timed only once
    device     where it runs if not told; None: on a GPU if there is one
    """

    cases: tuple[Case, ...]
    seconds: float
    at_least: int = 3
    at_most: int = 25
    patience: float = 10.0
    device: str | None = None

    def rounds(self, one_round: float, *, cases: int = 1) -> int:
        """How many fit into the time of `cases` cases, one of which takes `one_round` seconds for them all."""
        fit = int(cases * self.seconds / max(one_round, 1e-9))
        return max(self.at_least, min(self.at_most, fit))


CLIP = Shape(name="CLIP-L", in_features=1024, hidden_features=4096, out_features=1024)
SIGLIP = Shape(
    name="SigLIP-so400m",
    in_features=1152,
    hidden_features=4304,
    out_features=1152,
    activation="gelu_pytorch_tanh",
)
PROJECTOR = Shape(name="projector", in_features=1024, hidden_features=3072, out_features=3072)  # CLIP-L to Phi-3
FINE = Shape(  # the experts of OLMoE-1B-7B
    name="fine-grained",
    in_features=2048,
    hidden_features=1024,
    out_features=2048,
    num_experts=64,
    top_k=8,
    activation="silu",
    gated=True,
    bias=False,
)
MANY = Shape(name="many-experts", in_features=1024, hidden_features=1024, out_features=1024, num_experts=64, top_k=8)
PLAIN = dataclasses.replace(CLIP, name="CLIP-L-no-bias", bias=False)  # what kernels without biases can run
SWEPT = Shape(name="growth", in_features=256, hidden_features=1024, out_features=256, num_experts=8, top_k=2)
TINY = Shape(name="tiny", in_features=16, hidden_features=24, out_features=16)
TINY_GATED = dataclasses.replace(TINY, name="tiny-gated", activation="silu", gated=True, bias=False)

CLIP_TOKENS = 577  # of one image
SIGLIP_TOKENS = 256


def grid(subjects: Iterable[str], shapes: Iterable[Shape], tokens: Iterable[int], **choices) -> list[Case]:
    """Every combination; `choices` are lists of dtype, mode and router."""
    names, values = list(choices), list(choices.values())
    return [
        Case(subject=subject, shape=shape, tokens=t, **dict(zip(names, combination, strict=True)))
        for subject, shape, t in itertools.product(subjects, shapes, tokens)
        for combination in itertools.product(*values)
    ]


def growth(
    *, tokens: Iterable[int], experts: Iterable[int], top_k: Iterable[int], hidden: Iterable[int], at: int, dtype: str
) -> list[Case]:
    """Four series of a whole layer, each varying one size of SWEPT."""
    series = [("T", {"tokens": t}) for t in tokens]
    for letter, field, values in (
        ("N", "num_experts", experts),
        ("K", "top_k", top_k),
        ("H", "hidden_features", hidden),
    ):
        series += [(letter, {"shape": dataclasses.replace(SWEPT, **{field: v})}) for v in values]
    return [
        Case(subject="layer", dtype=dtype, sweep=letter, peers=("loop",), **{"shape": SWEPT, "tokens": at, **sizes})
        for letter, sizes in series
    ]


def tiny_cases() -> list[Case]:
    """A few seconds of everything, so that the suite is tested with the rest."""
    both = [TINY, TINY_GATED]
    return [
        *grid(["routing"], [TINY], [9], dtype=["fp32"], mode=["fwd+bwd"], router=list(COMPARED)),
        *grid(["permutation"], [TINY], [9], dtype=["bf16"], mode=["inference", "fwd+bwd"]),
        *grid(["experts"], both, [9], dtype=["bf16"], mode=MODES),
        *grid(["layer"], [TINY], [9], dtype=["bf16"], mode=["fwd+bwd"], router=list(COMPARED)),
        *grid(["layer"], [TINY_GATED], [9, 12], dtype=["fp32"], mode=["fwd+bwd"]),
        *grid(["encoder"], [TINY], [9], dtype=["fp32"], mode=["inference", "fwd+bwd"]),
        *grid(["training"], [TINY], [18], dtype=["fp32"]),
        *growth(tokens=(4, 8), experts=(2, 4), top_k=(1, 2), hidden=(8, 16), at=4, dtype="fp32"),
    ]


def quick_cases() -> list[Case]:
    return [
        *grid(["routing"], [CLIP], [CLIP_TOKENS], dtype=["bf16"], mode=["fwd+bwd"], router=list(COMPARED)),
        *grid(["permutation"], [CLIP], [4 * CLIP_TOKENS], dtype=["bf16"], mode=["fwd+bwd"]),
        *grid(["experts"], [MANY], [256], dtype=["bf16"], mode=["inference"]),
        *grid(["layer"], [CLIP], [64, 256], dtype=["bf16"], mode=["fwd+bwd"]),
        *grid(["layer"], [CLIP], [64], dtype=["bf16"], mode=["inference"]),
        *grid(["encoder"], [CLIP], [CLIP_TOKENS], dtype=["bf16"], mode=["fwd+bwd"]),
        *grid(["training"], [TINY], [16 * 48], dtype=["fp32"]),
        *growth(
            tokens=(64, 512, 4096),
            experts=(4, 16, 64),
            top_k=(1, 2, 4),
            hidden=(256, 1024, 4096),
            at=512,
            dtype="bf16",
        ),
    ]


def full_cases(dtypes: tuple[str, ...] = ("bf16", "fp32")) -> list[Case]:
    tokens = (64, 512, 4 * CLIP_TOKENS, 8192, 32768)
    vision = [CLIP, SIGLIP, PROJECTOR]
    return [
        *grid(["routing"], [CLIP, MANY], tokens, dtype=dtypes, mode=MODES, router=list(COMPARED)),
        *grid(["permutation"], [CLIP, MANY], tokens, dtype=dtypes, mode=["inference", "fwd+bwd"]),
        *grid(["experts"], [*vision, PLAIN, MANY, FINE], tokens[1:3], dtype=dtypes, mode=MODES),
        *grid(["layer"], [CLIP], tokens, dtype=dtypes, mode=MODES),
        *grid(
            ["layer"], [CLIP], tokens[2:3], dtype=dtypes, mode=["fwd+bwd"], router=[r for r in COMPARED if r != "smoe"]
        ),
        *grid(["layer"], [SIGLIP, PROJECTOR, MANY, FINE], tokens[1:3], dtype=dtypes, mode=["inference", "fwd+bwd"]),
        *grid(["encoder"], [CLIP], [4 * CLIP_TOKENS], dtype=dtypes, mode=["inference", "fwd+bwd"]),
        *grid(["encoder"], [SIGLIP], [8 * SIGLIP_TOKENS], dtype=dtypes, mode=["inference", "fwd+bwd"]),
        *grid(["training"], [TINY], [16 * 48], dtype=["fp32"]),
        *growth(
            tokens=(64, 256, 1024, 4096, 16384, 32768),
            experts=(4, 8, 16, 32, 64),
            top_k=(1, 2, 4, 8),
            hidden=(256, 512, 1024, 2048, 4096),
            at=4096,
            dtype="bf16",
        ),
    ]


def paper_cases() -> list[Case]:
    """The layers that LibMoE's paper trains, at its batch sizes: S2 makes 10 tiles of 577 tokens of one image."""
    tokens = [CLIP_TOKENS, 10 * CLIP_TOKENS, 4 * 10 * CLIP_TOKENS]
    return [
        *grid(["layer"], [CLIP, SIGLIP], tokens, dtype=["bf16"], mode=["inference", "fwd+bwd"], router=list(COMPARED)),
        *grid(["layer"], [PROJECTOR], [576, 4 * 576], dtype=["bf16"], mode=["inference", "fwd+bwd"]),
        *grid(["encoder"], [CLIP], tokens[:2], dtype=["bf16"], mode=["inference", "fwd+bwd"]),
        *grid(
            ["encoder"], [SIGLIP], [SIGLIP_TOKENS, 10 * SIGLIP_TOKENS], dtype=["bf16"], mode=["inference", "fwd+bwd"]
        ),
        *grid(["training"], [TINY], [16 * 48], dtype=["fp32"]),
    ]


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer of the CPU table, and the time / limit to reach in inference and in training."""

    shape: Shape
    tokens: int
    dtype: str
    inference: float
    training: float

    @property
    def sizes(self) -> str:
        """T, D, H, O, N, K."""
        s = self.shape
        sizes = (self.tokens, s.in_features, s.hidden_features, s.out_features, s.num_experts, s.top_k)
        return ", ".join(map(str, sizes))

    def case(self, mode: str, **choices) -> Case:
        return Case(subject="layer", shape=self.shape, tokens=self.tokens, dtype=self.dtype, mode=mode, **choices)


CPU_TARGETS = (
    Target(CLIP, 4 * CLIP_TOKENS, "bf16", 1.06, 1.10),
    Target(CLIP, 4 * CLIP_TOKENS, "fp32", 1.03, 1.08),
    Target(SIGLIP, 8 * SIGLIP_TOKENS, "bf16", 1.06, 1.10),
    Target(CLIP, 512, "bf16", 1.10, 1.25),
    Target(CLIP, 64, "bf16", 1.40, 2.00),
    Target(MANY, 2304, "bf16", 1.15, 1.35),
    Target(MANY, 2304, "fp32", 1.15, 1.35),
)


def cpu_cases() -> list[Case]:
    return [target.case(mode) for target in CPU_TARGETS for mode in ("inference", "fwd+bwd")]


PRESETS = {
    "tiny": lambda: Preset(cases=tuple(tiny_cases()), seconds=0.0, at_least=3),
    "quick": lambda: Preset(cases=tuple(quick_cases()), seconds=1.0, at_most=15, patience=1.0),
    "full": lambda: Preset(cases=tuple(full_cases()), seconds=15.0, at_least=5),
    "paper": lambda: Preset(cases=tuple(paper_cases()), seconds=30.0, at_least=5),
    "cpu": lambda: Preset(cases=tuple(cpu_cases()), seconds=15.0, at_least=5, device="cpu"),
}


def find_preset(name: str) -> Preset:
    """Raises ConfigError for a name there is none of."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
