"""How close one MoE layer on the CPU comes to its GEMMs alone: time / time of the same FLOPs as dense `mm(out=)`.

    python benchmarks/cpu_ratio.py                      # every shape of the table, all three implementations
    python benchmarks/cpu_ratio.py --shape 64 --dtype bf16 --rounds 20
    python benchmarks/cpu_ratio.py --quick              # fewer rounds, ours only

The layer has an SMoE router and GELU MLPs with biases. Every round times the dense limit and then each implementation
right after it; the ratio of the two is taken per round and the median over rounds reported with its quartiles, so that
a machine that is busy for a while slows both. Prints one Markdown table; lower is better, below 1 beats torch's mm.

    ours      libmoe_fast.MoE(backend="cpu")
    loop      LibMoE's way: for each expert, gather its tokens, run its MLP, add the weighted result
    grouped   sort the tokens by expert, torch grouped_mm, undo the sort
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from libmoe_fast import MoE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """A shape, its dtype, and the ratios to reach."""

    tokens: int
    in_features: int
    hidden: int
    out: int
    experts: int
    top_k: int
    dtype: str
    forward: float
    both: float

    @property
    def shape(self) -> str:
        return ", ".join(map(str, self[:6]))


CASES = (
    Case(2308, 1024, 4096, 1024, 4, 2, "bf16", 1.06, 1.10),  # CLIP-L/14-336, four images
    Case(2308, 1024, 4096, 1024, 4, 2, "fp32", 1.03, 1.08),
    Case(2048, 1152, 4304, 1152, 4, 2, "bf16", 1.06, 1.10),  # SigLIP-so400m-224, eight images
    Case(512, 1024, 4096, 1024, 4, 2, "bf16", 1.10, 1.25),
    Case(64, 1024, 4096, 1024, 4, 2, "bf16", 1.40, 2.00),
    Case(2304, 1024, 1024, 1024, 64, 8, "bf16", 1.15, 1.35),  # many small experts
    Case(2304, 1024, 1024, 1024, 64, 8, "fp32", 1.15, 1.35),
)


# ---------------------------------------------------------------------------------------------------------------------
# The limit and the implementations


def dense_limit(case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward GEMMs of the layer's FLOPs as six dense products, outputs allocated before."""
    rows, dtype = case.tokens * case.top_k, DTYPES[case.dtype]

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, h, dy = tensor(rows, case.in_features), tensor(rows, case.hidden), tensor(rows, case.out)
    w1, w2 = tensor(case.hidden, case.in_features), tensor(case.out, case.hidden)
    dw1, dw2, z, y, dh, dx = (torch.empty_like(t) for t in (w1, w2, h, dy, h, x))

    def forward() -> None:
        torch.mm(x, w1.t(), out=z)
        torch.mm(h, w2.t(), out=y)

    def backward() -> None:
        torch.mm(dy, w2, out=dh)
        torch.mm(dy.t(), h, out=dw2)
        torch.mm(dh, w1, out=dx)
        torch.mm(dh.t(), x, out=dw1)

    return forward, backward


def smoe_route(moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    probs = F.softmax(x.float() @ moe.router.weight.float().t(), -1)
    weights, index = probs.topk(moe.router.spec.top_k, -1)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), index


def loop(moe: MoE, x: Tensor) -> Tensor:
    """Per expert: the tokens that chose it, its MLP, their weighted results added in place."""
    weights, index = smoe_route(moe, x)
    e = moe.experts
    y = x.new_zeros(x.shape[0], e.out_features)
    for i in range(e.num_experts):
        token, choice = torch.where(index == i)
        out = F.linear(F.gelu(F.linear(x[token], e.w1[i], e.b1[i])), e.w2[i], e.b2[i])
        y[token] += weights[token, choice].unsqueeze(1) * out
    return y


def grouped(moe: MoE, x: Tensor) -> Tensor:
    """One grouped GEMM per layer over tokens sorted by expert, biases by indexing."""
    weights, index = smoe_route(moe, x)
    e, flat = moe.experts, index.flatten()
    order = flat.argsort(stable=True)
    expert, token = flat[order], order // index.shape[1]
    ends = torch.bincount(flat, minlength=e.num_experts).cumsum(0).int()
    z = F.grouped_mm(x[token], e.w1.transpose(1, 2), offs=ends) + e.b1[expert]
    y = F.grouped_mm(F.gelu(z), e.w2.transpose(1, 2), offs=ends) + e.b2[expert]
    y = y * weights.flatten()[order].unsqueeze(1)
    return y[order.argsort()].view(x.shape[0], -1, e.out_features).sum(1)


IMPLEMENTATIONS = {"ours": lambda moe, x: moe(x), "loop": loop, "grouped": grouped}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds(function: Callable[[], object]) -> float:
    """With one thread the time it ran, so that a busy machine matters less; else the time it took."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def measure(case: Case, names: list[str], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Per implementation, the ratios of all rounds: forward, and forward + backward. One round more warms up."""
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    moe = MoE(*case[1:4], num_experts=case.experts, top_k=case.top_k, aux_mode="off", backend="cpu", dtype=dtype)
    x = torch.randn(case.tokens, case.in_features).to(dtype).requires_grad_()
    dy = torch.randn(case.tokens, case.out).to(dtype)
    limit_forward, limit_backward = dense_limit(case)
    ratios = {name: ([], []) for name in names}

    def forward(function) -> None:
        with torch.no_grad():
            function(moe, x)

    def both(function) -> None:
        x.grad = None
        moe.zero_grad(set_to_none=True)
        function(moe, x).backward(dy)

    for round_ in range(rounds + 1):
        for name in names:
            function = IMPLEMENTATIONS[name]
            limits = seconds(limit_forward), seconds(limit_backward)
            times = seconds(lambda f=function: forward(f)), seconds(lambda f=function: both(f))
            if round_ > 0:
                ratios[name][0].append(times[0] / limits[0])
                ratios[name][1].append(times[1] / sum(limits))
    return ratios


def spread(values: list[float]) -> str:
    """median [first quartile, third quartile]"""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def table_row(case: Case, ratios: dict[str, tuple[list[float], list[float]]]) -> str:
    cells = [case.shape, case.dtype, f"{case.forward:.2f} / {case.both:.2f}"]
    cells += [f"{spread(forward)} / {spread(both)}" for forward, both in ratios.values()]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="only the shapes that begin with this, such as 64 or '2304, 1024'")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="only this implementation")
    parser.add_argument("--rounds", type=int, default=9, help="rounds per shape (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="three rounds, ours only")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    names = ["ours"] if options.quick else [options.only] if options.only else list(IMPLEMENTATIONS)
    cases = [c for c in CASES if c.shape.startswith(options.shape or "") and options.dtype in (None, c.dtype)]
    if not cases:
        parser.error(f"no shape begins with {options.shape!r}; there are {'; '.join({c.shape: 0 for c in CASES})}")
    print(f"| T, D, H, O, N, K | dtype | target fwd / fwd+bwd | {' | '.join(names)} |")
    print(f"|{'---|' * (3 + len(names))}")
    for case in cases:
        ratios = measure(case, names, 3 if options.quick else options.rounds)
        print(table_row(case, ratios), flush=True)


if __name__ == "__main__":
    main()
