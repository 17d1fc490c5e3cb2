"""The five routers of LibMoE, each a RouterSpec plus the parameters it learns, and a registry for a sixth.

A router that fits the pipeline of RouterSpec is one small class: declare the spec, hold `weight` (and `bias`), and
every backend runs it. One that does not overrides `forward` and returns a Routing. What a layer passes besides the
tokens (backend, loss options) goes on to ops.route as `context`, unread.
"""

import dataclasses
import hashlib
import importlib
import inspect
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from libmoe_fast import ops
from libmoe_fast.errors import ConfigError
from libmoe_fast.reference import accumulation_dtype
from libmoe_fast.spec import RouterSpec, Routing, check_choice, check_positive

GENERATED_AT_A_TIME = 8192  # rows of the hypernetwork's second layer
GATE_STD = 0.02  # LibMoE draws every gate from N(0, 0.02)
ALWAYS_ONE = """\
router {name!r} with top_k = 1: the one gate weight of a token is always 1, so the task's loss gives the router no \
gradient, only the auxiliary losses do. Take top_k = 2 or more, or weights that are not normalized: router "smoe" or \
"sigmoid" with normalize="none" (Switch Transformer: the probability itself)."""

SIZES = ("dim", "num_experts", "top_k")  # what a layer passes to a router besides its options
PLACES = ("device", "dtype")

ROUTERS: dict[str, type["Router"]] = {}
COMPARED = (
    "smoe",
    "cosine",
    "perturbed_cosine",
    "sigmoid",
    "hyper",
)  # in LibMoE's paper, our benchmarks and the demo


def register_router(name: str) -> Callable[[type["Router"]], type["Router"]]:
    """Class decorator: makes a Router subclass known as `router=name`. A taken name is a ConfigError."""

    def register(cls: type["Router"]) -> type["Router"]:
        if ROUTERS.get(name, cls) is not cls:
            raise ConfigError(f"router name {name!r} is taken by {ROUTERS[name].__name__}; choose another")
        ROUTERS[name] = cls
        return cls

    return register


def find_router(name: str) -> type["Router"]:
    """The class registered as `name`, or found at "package.module:ClassName".

    Raises ConfigError for an unknown name or an import that fails.
    """
    if not isinstance(name, str):
        raise ConfigError(f"router is {name!r}; give a name, one of {', '.join(ROUTERS)}")
    if name in ROUTERS:
        return ROUTERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"unknown router {name!r}; choose one of {', '.join(ROUTERS)}, or name a class as 'package.module:Class'"
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"router {name!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise ConfigError(f"router {name!r} is not a subclass of libmoe_fast.Router")
    return cls


def build_router(name: str, dim: int, num_experts: int, top_k: int, **options) -> "Router":
    """Builds a router by name. Options it does not have are a ConfigError that lists those it has."""
    cls = find_router(name)
    check_router_options(name, {o: value for o, value in options.items() if o not in PLACES})
    router = cls(dim, num_experts, top_k, **options)
    spec = getattr(router, "routed", router.spec)  # of the experts that are not every token's
    if spec.top_k == 1 < spec.num_experts and spec.weights_sum_to_one:
        warnings.warn(ALWAYS_ONE.format(name=name), stacklevel=2)
    return router


def check_router_options(name: str, options: dict | None) -> None:
    """Raises ConfigError for options that router `name` does not have; device and dtype are the layer's."""
    known = [o for o in inspect.signature(find_router(name)).parameters if o not in (*SIZES, *PLACES)]
    if not isinstance(options or {}, dict) or not all(isinstance(option, str) for option in options or {}):
        raise ConfigError(f"router_options is {options!r}; give options by name, as in {{'temperature': 0.5}}")
    if unknown := sorted(set(options or {}) - set(known)):
        raise ConfigError(f"router {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")


class Router(nn.Module):
    """Scores tokens x [T, D] against N experts and chooses K (see RouterSpec for the pipeline).

    Holds `weight` [N, D] ~ N(0, 0.02) and, where the spec has one, `bias` [N] = 0.
    """

    def __init__(self, dim: int, spec: RouterSpec, *, device=None, dtype=None) -> None:
        super().__init__()
        self.dim, self.spec = dim, spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, dim, device=device, dtype=dtype))  # [N, D]
        if spec.bias != "none":
            self.bias = nn.Parameter(torch.empty(spec.num_experts, device=device, dtype=dtype))  # [N]
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=GATE_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def fitting(cls, options: dict, in_features: int, out_features: int) -> dict:
        """The options for a layer of this shape, where a router's choices beside its experts ask for one of its own."""
        return options

    def free_output(self, x: Tensor, routing: Routing) -> Tensor | None:
        """What the choices of `routing` beside the experts (Routing.free) put out for x [T, D], weighted and summed
        [T, O]; None: nothing."""
        return None

    def set_progress(self, step: int, total: int) -> None:
        """Tells the router how far training is; only routers with a schedule listen."""

    def forward(self, x: Tensor, **context) -> Routing:
        return ops.route(x, self.weight, self.bias, spec=self.spec, **context)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.spec.num_experts}, top_k={self.spec.top_k}"


@register_router("smoe")
class SMoERouter(Router):
    """Softmax top-K gate (Shazeer et al. 2017; Fedus et al. 2022).

    noise: training noise on the score, LibMoE eq. 2. "off" (LibMoE v1.1), "gaussian" (std `noise_std`), or "learned":
    noisy top-k, std softplus(x . noise_weight_i) (Shazeer et al. 2017, eq. 4), noise_weight [N, D] from zero.
    normalize: "sum" (w = p / sum p), or "none" (w = p, Fedus et al. 2022, eq. 2: what a router with K = 1 learns from;
    weights do not sum to 1, so an upcycled layer does not start equal to its dense MLP).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        noise: str = "off",
        noise_std: float = 1.0,
        normalize: str = "sum",
        device=None,
        dtype=None,
    ) -> None:
        check_choice("normalize", normalize, ("sum", "none"))
        spec = RouterSpec(num_experts=num_experts, top_k=top_k, noise=noise, noise_std=noise_std, gate=normalize)
        super().__init__(dim, spec, device=device, dtype=dtype)
        if noise == "learned":
            self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))  # [N, D]
        else:
            self.register_parameter("noise_weight", None)

    def forward(self, x: Tensor, **context) -> Routing:
        noise = None
        if self.training and self.spec.noise != "off":
            noise = torch.randn(x.shape[0], self.spec.num_experts, device=x.device, dtype=torch.float32)  # [T, N]
        return ops.route(x, self.weight, None, spec=self.spec, noise=noise, noise_weight=self.noise_weight, **context)


@register_router("cosine")
class CosineRouter(Router):
    """Cosine gate (Chi et al. 2022): softmax(cos / temperature), bias on the selection score, softmax over the chosen.

    temperature: fixed, or the start of a learned one (`learn_temperature`; see Temperature).
    proj_dim: score in a learned low-dimensional projection of x (Chi et al., section 3.2); None scores x itself.
    """

    tau = 0.0

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        proj_dim: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        check_positive("temperature", temperature)
        if proj_dim is not None and not (isinstance(proj_dim, int) and proj_dim >= 1):
            raise ConfigError(f"proj_dim is {proj_dim!r}; it must be at least 1, or None for no projection")
        spec = RouterSpec(
            num_experts=num_experts, top_k=top_k, score="cosine", tau=self.tau, bias="selection", gate="softmax"
        )
        super().__init__(proj_dim or dim, spec, device=device, dtype=dtype)
        self.projection = nn.Linear(dim, proj_dim, bias=False, device=device, dtype=dtype) if proj_dim else None
        self.temperature = temperature
        # Called norm, as it scales cosines, and because transformers' Trainer decays no parameter inside of a norm.
        self.norm = Temperature(temperature, device=device, dtype=dtype) if learn_temperature else None

    def forward(self, x: Tensor, **context) -> Routing:
        if self.projection is not None:
            # Recomputed, so that no float32 copy of x is kept.
            x = ops.recomputed(ops.float_linear, x, self.projection.weight)  # [T, proj_dim]
        temperature = self.temperature if self.norm is None else self.norm()
        return ops.route(x, self.weight, self.bias, spec=self.spec, temperature=temperature, **context)


class Temperature(nn.Module):
    """A learned one, kept positive as exp(log_temperature)."""

    def __init__(self, start: float, *, device=None, dtype=None) -> None:
        super().__init__()
        self.start = start
        self.log_temperature = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_temperature, math.log(self.start))

    def forward(self) -> Tensor:
        return self.log_temperature.to(accumulation_dtype(self.log_temperature.dtype)).exp()


@register_router("perturbed_cosine")
class PerturbedCosineRouter(CosineRouter):
    """Cosine gate with tau = 0.1 added to both norms, which restores fast estimation rates (Nguyen et al. 2024a)."""

    tau = 0.1


@register_router("sigmoid")
class SigmoidRouter(Router):
    """Sigmoid gate with a bias on the score (Csordas et al. 2023).

    normalize: "softmax" (LibMoE v1.1: p = softmax(sigmoid(score)), w = p / sum p), "sum" (p = sigmoid(score),
    w = p / sum p), or "none" (sigma-MoE: w = sigmoid(score); weights do not sum to 1, so an upcycled layer does
    not start equal to its dense MLP).
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, normalize: str = "softmax", device=None, dtype=None
    ) -> None:
        check_choice("normalize", normalize, ("softmax", "sum", "none"))
        spec = RouterSpec(
            num_experts=num_experts,
            top_k=top_k,
            bias="score",
            probability="softmax_sigmoid" if normalize == "softmax" else "sigmoid",
            gate="none" if normalize == "none" else "sum",
        )
        super().__init__(dim, spec, device=device, dtype=dtype)


@register_router("hyper")
class HyperRouter(Router):
    """A gate generated by a frozen random hypernetwork from one learned embedding (Do et al. 2023).

    [W, b] = hypernetwork(embedding): Linear(D, D/4), ReLU, Linear(D/4, N (D + 1)). Only `embedding` [D] learns.
    In training K rises from 1 to top_k with `set_progress`: round((top_k - 1) * step / total) + 1; before the first
    call, and in evaluation, it is top_k.

    seed: of the hypernetwork's weights, which are the same wherever the router is made again: training scripts that
    store trainable parameters only (LLaVA's mm_projector.bin, non_lora_trainables.bin) then lose nothing. `upcycle`
    numbers its layers with it.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, seed: int = 0, device=None, dtype=None) -> None:
        if not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise ConfigError(f"seed is {seed!r}; expected a whole number from 0 to 2^63 - 1")
        spec = RouterSpec(
            num_experts=num_experts, top_k=top_k, bias="score", probability="identity", gate="softmax", aux=False
        )
        nn.Module.__init__(self)  # weight and bias are generated, not parameters
        self.dim, self.spec = dim, spec
        # One spec per K, made once: a schedule step is then an index, which torch.compile can guard on.
        self.schedule = [dataclasses.replace(spec, top_k=k) for k in range(1, top_k + 1)]
        self.training_top_k = top_k
        self.embedding = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))  # [D]
        self.hypernet = Hypernetwork(dim, num_experts, seed=seed, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding)
        self.hypernet.reset_parameters()

    def set_progress(self, step: int, total: int) -> None:
        done = min(max(step / max(total, 1), 0.0), 1.0)
        self.training_top_k = round((self.spec.top_k - 1) * done) + 1

    def forward(self, x: Tensor, **context) -> Routing:
        weight, bias = self.hypernet(self.embedding)
        spec = self.schedule[self.training_top_k - 1] if self.training else self.spec
        return ops.route(x, weight, bias, spec=spec, **context)


class Hypernetwork(nn.Module):
    """embedding [D] -> W [N, D], b [N] in float32. Its tensors are buffers: saved with the model, so that a reload
    gives the same gate, and out of reach of `requires_grad_(True)`, so that "train everything" leaves it frozen.
    """

    def __init__(self, dim: int, num_experts: int, *, seed: int, device=None, dtype=None) -> None:
        super().__init__()
        self.dim, self.num_experts, self.seed = dim, num_experts, seed
        hidden = max(dim // 4, 1)
        for name, shape in {
            "w1": (hidden, dim),
            "b1": (hidden,),
            "w2": (num_experts * (dim + 1), hidden),
            "b2": (num_experts * (dim + 1),),
        }.items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """He scaling, so that a standard normal embedding generates gates of standard deviation 0.02."""
        hidden, dim = self.w1.shape
        if not self.w1.is_meta:
            # Not the seed itself: after torch.manual_seed(0) the embedding would be drawn as the same numbers.
            digest = hashlib.sha256(f"libmoe_fast hypernetwork {self.seed}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            # Drawn on the CPU, because devices draw differently.
            for weight, std in ((self.w1, math.sqrt(2 / dim)), (self.w2, GATE_STD / math.sqrt(hidden))):
                weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu").mul_(std))
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        generate = generate_gate if ops.transform() else GenerateGate.apply
        flat = generate(embedding, self.w1, self.b1, self.w2, self.b2)  # [N (D + 1)]
        rows = flat.view(self.num_experts, self.dim + 1)  # [N, D + 1]: W_i, then b_i
        return rows[:, :-1], rows[:, -1]


def generate_gate(embedding: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return ops.float_linear(torch.relu(ops.float_linear(embedding, w1) + b1), w2) + b2


class GenerateGate(torch.autograd.Function):
    """generate_gate, w2 relu(w1 embedding + b1) + b2 in float32. Keeps the frozen tensors as they are for backward:
    left to autograd, bf16 ones would be kept as float32 copies, N (D + 1) D / 4 numbers that nobody needs twice. w2 is
    widened in parts that fit a cache: at N = 64 that takes a CPU a fifteenth of the time.
    """

    @staticmethod
    def forward(ctx, embedding: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = torch.relu(ops.float_linear(embedding, w1) + b1)  # [D / 4]
        ctx.save_for_backward(hidden, w1, w2)
        ctx.dtype = embedding.dtype
        return torch.cat([ops.float_linear(hidden, rows) for rows in w2.split(GENERATED_AT_A_TIME)]) + b2

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, w1, w2 = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden)  # [D / 4]
        for part, rows in zip(grad.split(GENERATED_AT_A_TIME), w2.split(GENERATED_AT_A_TIME), strict=True):
            dhidden = dhidden + ops.float_linear(part, rows.t())
        return ops.float_linear(dhidden * (hidden > 0), w1.t()).to(ctx.dtype), None, None, None, None
