"""The mathematics of the layer in plain PyTorch, no tricks: the oracle of every kernel, and a backend anywhere.

    route:    x [T, D], W [N, D] -> scores -> p -> s -> top-K -> index, gate weights [T, K]
    experts:  y_t = sum over the chosen e of w_te * (W2_e act(W1_e x_t + b1_e) + b2_e)

Every expert runs on every token and unchosen ones are weighted 0: N / K times the work, in exchange for code
that is its own specification, runs on any device, and has no data-dependent shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from libmoe_fast.spec import RouterSpec, Routing


def quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


LIMIT = 7.0  # of "gpt_oss": gates are cut off above it, what they multiply on both sides
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "gpt_oss": lambda z: quick_gelu(z.clamp(max=LIMIT)),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every activation dtype but float64, which keeps its own (finite-difference checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    spec: RouterSpec,
    temperature: Tensor | float = 1.0,
    noise: Tensor | None = None,
    noise_weight: Tensor | None = None,
) -> Routing:
    """Chooses experts for tokens; everything in float32 whatever the dtype of x, so bf16 never flips a choice.

    x [T, D]; weight [N, D]; bias [N] where the spec has one; noise [T, N] standard normal draws, scaled by
    spec.noise_std or by softplus(x . noise_weight_i), noise_weight [N, D] (Shazeer et al. 2017, eq. 4).
    """
    dtype = accumulation_dtype(x.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    score = x @ weight.t()  # [T, N]
    if spec.score == "cosine":
        score = score / (safe_norm(x, spec.tau) * safe_norm(weight, spec.tau).t())
    if spec.bias == "score":
        score = score + bias.to(dtype)
    if noise is not None:
        std = F.softplus(x @ noise_weight.to(dtype).t()) if spec.noise == "learned" else spec.noise_std
        score = score + noise.to(dtype) * std

    logits = torch.sigmoid(score) if "sigmoid" in spec.probability else score
    if spec.probability in ("softmax", "softmax_sigmoid"):
        probs = torch.softmax(logits / temperature, dim=-1)
    else:
        probs = logits
    selection = probs + bias.to(dtype) if spec.bias == "selection" else probs

    index = top_k(selection, spec.top_k)  # [T, K]
    if spec.gate == "softmax":
        weights = torch.softmax(selection.gather(-1, index), dim=-1)
    else:
        weights = probs.gather(-1, index)
        if spec.gate == "sum":
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return Routing(index, weights, probs, logits)


def top_k(selection: Tensor, k: int) -> Tensor:
    """Indices of the k largest of [T, N], best first, ties to the lowest index (torch.topk promises no order)."""
    return torch.sort(selection, dim=-1, descending=True, stable=True).indices[..., :k]


def safe_norm(rows: Tensor, tau: float) -> Tensor:
    """norm + tau [rows, 1], floored at 1e-12, with a zero gradient (not NaN) where a row is zero."""
    square = rows.square().sum(-1, keepdim=True)
    norm = torch.where(square > 0, square, 1.0).sqrt()
    return (torch.where(square > 0, norm, 0.0) + tau).clamp_min(1e-12)


def experts(
    x: Tensor,
    weights: Tensor,
    index: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str,
    gated: bool = False,
) -> Tensor:
    """Runs the chosen experts and sums their outputs, weighted, in float32 -> [T, O] in the dtype of x.

    x [T, D]; weights, index [T, K]; w1 [N, H, D] ([N, 2H, D] gated: gate rows, then up rows); b1 [N, H or 2H];
    w2 [N, O, H]; b2 [N, O].
    """
    dtype = accumulation_dtype(x.dtype)
    tokens = x.to(dtype)  # so that the experts' gradients of x, each in its dtype, are summed in this one
    y = x.new_zeros((x.shape[0], w2.shape[1]), dtype=dtype)  # [T, O]
    for e in range(w1.shape[0]):
        z = F.linear(tokens.to(x.dtype), w1[e], None if b1 is None else b1[e])  # [T, H or 2H]
        out = F.linear(activate(z, activation, gated), w2[e], None if b2 is None else b2[e])  # [T, O]
        gate = torch.where(index == e, weights.to(dtype), 0.0).sum(-1, keepdim=True)  # [T, 1]
        y = y + gate * out.to(dtype)
    return y.to(x.dtype)


def activate(z: Tensor, activation: str, gated: bool) -> Tensor:
    """act(z) [.., H], or act(gate) * up of z = [gate, up] [.., 2H] for gated experts (SwiGLU, GeGLU).

    "gpt_oss" (OpenAI 2025) gates another factor: act(gate) * (1 + up), up cut off at both ends.
    """
    act = ACTIVATIONS[activation]
    if not gated:
        return act(z)
    gate, up = z.chunk(2, dim=-1)
    return act(gate) * (1 + up.clamp(-LIMIT, LIMIT) if activation == "gpt_oss" else up)
