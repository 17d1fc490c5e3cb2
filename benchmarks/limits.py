"""What no implementation can beat by much: the same FLOPs as dense GEMMs, the same bytes as a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from libmoe_fast.benchmarks.cases import Case


def dense_gemms(case: Case, device: torch.device) -> Callable[[], None]:
    """The FLOPs of the experts as dense `mm(out=)`: two products forward, four more with backward.

    All T*K rows go through one expert's weights, outputs allocated before, no bias, no activation, no routing.
    """
    shape, rows = case.shape, case.tokens * case.shape.top_k
    up_rows = shape.hidden_features * (2 if shape.gated else 1)

    def tensor(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(case.torch_dtype)

    x, h, dy = tensor(rows, shape.in_features), tensor(rows, shape.hidden_features), tensor(rows, shape.out_features)
    w1, w2 = tensor(up_rows, shape.in_features), tensor(shape.out_features, shape.hidden_features)
    z, y = tensor(rows, up_rows), torch.empty_like(dy)

    def forward() -> None:
        torch.mm(x, w1.t(), out=z)
        torch.mm(h, w2.t(), out=y)

    if case.mode != "fwd+bwd":
        return forward
    dw1, dw2, dz, dh, dx = (torch.empty_like(t) for t in (w1, w2, z, h, x))
    dz.copy_(z)

    def both() -> None:
        forward()
        torch.mm(dy, w2, out=dh)
        torch.mm(dy.t(), h, out=dw2)
        torch.mm(dz, w1, out=dx)
        torch.mm(dz.t(), x, out=dw1)

    return both


def copy_of(byte_count: int, device: torch.device) -> Callable[[], None]:
    """Moves `byte_count` bytes through memory, half of them read and half written."""
    source = torch.ones(max(byte_count // 2, 1), dtype=torch.int8, device=device)  # written, else there are no pages
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
