"""The layers that the compile gate and the traffic count look at, and the launches that one makes."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from libmoe_fast.spec import RouterSpec

from . import dispatch as routing
from . import experts as layer
from .run import Launch, observing

SPECS = {
    "smoe": {},
    "cosine": {"score": "cosine", "bias": "selection", "gate": "softmax"},
    "perturbed_cosine": {"score": "cosine", "tau": 0.1, "bias": "selection", "gate": "softmax"},
    "sigmoid": {"bias": "score", "probability": "softmax_sigmoid"},
    "hyper": {"bias": "score", "probability": "identity", "gate": "softmax", "aux": False},
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer and its batch: S sequences of T / S tokens."""

    name: str
    T: int
    D: int
    H: int
    O: int
    N: int
    K: int
    S: int = 1
    activation: str = "gelu"
    gated: bool = False
    bias: bool = True

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def up_rows(self) -> int:
        return self.H * (2 if self.gated else 1)


SHAPES = (
    Shape(name="CLIP-L", T=2308, D=1024, H=4096, O=1024, N=4, K=2, S=4, activation="quick_gelu"),
    Shape(name="SigLIP", T=2048, D=1152, H=4304, O=1152, N=4, K=2, S=8, activation="gelu_pytorch_tanh"),
    Shape(name="fine-grained", T=2304, D=2048, H=1024, O=2048, N=64, K=8, activation="silu", gated=True),
)

NO_BIASES = Shape(name="no biases", T=2304, D=512, H=256, O=512, N=64, K=8, activation="silu", gated=True, bias=False)
# Beside these, for what is compiled differently: one token, many experts, rows of odd length, no biases.
CORNERS = (
    Shape(name="one token", T=1, D=1024, H=4096, O=1024, N=4, K=2),
    Shape(name="N=256", T=16384, D=2048, H=512, O=2048, N=256, K=8, S=4, activation="silu", gated=True),
    Shape(name="odd", T=1000, D=1000, H=4100, O=1000, N=6, K=3),
    NO_BIASES,
    Shape(name="gpt-oss-20b", T=4096, D=2880, H=2880, O=2880, N=32, K=4, activation="gpt_oss", gated=True),
    Shape(name="odd gated", T=1001, D=1001, H=333, O=77, N=5, K=5, activation="relu", gated=True),
)

# What `make gpu` checks every tile at. The gated one has small experts, so that float64 copies of it fit a GPU several
# times: tests run side by side.
CHECKED = (
    SHAPES[0],
    SHAPES[1],
    NO_BIASES,
    Shape(name="no multiple of 16", T=1000, D=1000, H=1100, O=1000, N=6, K=3),
    Shape(name="gpt-oss", T=1000, D=512, H=256, O=512, N=16, K=4, activation="gpt_oss", gated=True),
    Shape(name="decoding", T=7, D=1024, H=4096, O=1024, N=8, K=2),
    # Of this one the tests let some choices be of no expert; the kernels are CLIP-L's.
    Shape(name="free choices", T=1000, D=1024, H=4096, O=1024, N=4, K=2, activation="quick_gelu"),
)


def layer_launches(shape: Shape, architecture: str, router: str = "smoe", dtype=torch.bfloat16) -> list[Launch]:
    """The launches of one training step of a layer on an architecture, in order. Nothing runs; no GPU is needed."""
    seen: list[Launch] = []
    with FakeTensorMode(), observing(seen.append, architecture=architecture):
        run_layer(shape, router, dtype, torch.device("cuda"))
    return seen


def run_layer(shape: Shape, router: str, dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward of a layer on random tensors, kernels only."""
    T, D, H, O, N = shape.T, shape.D, shape.H, shape.O, shape.N

    def tensor(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    spec = RouterSpec(num_experts=N, top_k=shape.K, **SPECS[router])
    inputs = routing.RouterInputs(tensor(T, D), tensor(N, D), tensor(N) if spec.bias != "none" else None)
    w1, w2 = tensor(N, shape.up_rows, D), tensor(N, O, H)
    b1, b2 = (tensor(N, shape.up_rows), tensor(N, O)) if shape.bias else (None, None)
    expert = layer.ExpertWeights(w1, b1, w2, b2, shape.activation, shape.gated)
    coefficients = {"balance_coef": 0.01, "z_coef": 0.001}
    routed, permuted, values = routing.dispatch(
        inputs, spec=spec, temperature=1.0, sequences=shape.S, over_topk=False, **coefficients
    )
    y, z = layer.experts(inputs.x, routed.weights, permuted, expert, store_z=True)
    grads = layer.experts_backward(y, inputs.x, routed.weights, permuted, expert, z, weight_grads=True)
    routing.dispatch_backward(
        inputs,
        routed,
        permuted.inverse,
        values.first_share,
        dweights=grads.dweights,
        dlosses=None,
        aux_scale=tensor(dtype=torch.float32) if spec.aux else None,
        dxs=grads.dxs,
        spec=spec,
        temperature=1.0,
        **coefficients,
    )
