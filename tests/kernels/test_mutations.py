"""Are the comparisons sharp? Each mutation breaks one line of a copy of the kernels, and its check must then fail.

A mutation stays inside the memory that the kernel may touch: it runs in this process.
"""

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kernel_checks import (
    LAST_ROUND,
    DispatchCase,
    ExpertCase,
    Kernels,
    check_dispatch,
    check_experts,
    dispatch_data,
    load_kernels,
    run_dispatch,
)

SOURCE = Path(load_kernels().dispatch.__file__).parent


def check_ties(kernels: Kernels) -> None:
    case = DispatchCase(tokens=5, sequences=1)
    data = dispatch_data(case)
    data.w.zero_()
    assert (run_dispatch(kernels, case, data)["index"].cpu() == torch.arange(case.K)).all()


CHECKS: dict[str, Callable[[Kernels], None]] = {
    "gaussian": lambda kernels: check_dispatch(
        kernels, DispatchCase(router={"noise": "gaussian", "noise_std": 0.6}, tokens=140)
    ),
    "learned noise": lambda kernels: check_dispatch(kernels, DispatchCase(router={"noise": "learned"})),
    "cosine": lambda kernels: check_dispatch(
        kernels,
        DispatchCase(
            router={"score": "cosine", "tau": 0.1, "bias": "selection", "gate": "softmax"}, learn_temperature=True
        ),
    ),
    "sigmoid": lambda kernels: check_dispatch(
        kernels, DispatchCase(router={"bias": "score", "probability": "softmax_sigmoid"}, over="topk")
    ),
    "wide": lambda kernels: check_dispatch(kernels, DispatchCase(D=520)),
    "ties": check_ties,
    "experts": lambda kernels: check_experts(kernels, ExpertCase(T=160, N=4, K=2)),
    "last round": lambda kernels: check_experts(kernels, ExpertCase(**LAST_ROUND)),
    "gated": lambda kernels: check_experts(kernels, ExpertCase(gated=True, activation="silu")),
    "bfloat16": lambda kernels: check_experts(kernels, ExpertCase(dtype=torch.bfloat16)),
}


class Mutation(NamedTuple):
    """In `file`, `old` (which is there once) becomes `new`."""

    name: str
    check: str
    file: str
    old: str
    new: str


MUTATIONS = [
    # Routing and permutation
    Mutation("noise-dropped", "gaussian", "routing.py", "score += noise * noise_std", "score += 0.0 * noise_std"),
    Mutation("tau-dropped", "cosine", "routing.py", "tl.sqrt(x_square) + tau", "tl.sqrt(x_square)"),
    Mutation("score-bias-dropped", "sigmoid", "routing.py", "score += bias[None, :]", "score += 0.0 * bias[None, :]"),
    Mutation(
        "ties-to-the-right",
        "ties",
        "routing.py",
        "tl.max(left, 1, return",
        "tl.max(left + 1e-7 * n[None, :], 1, return",
    ),
    Mutation("first-choices-only", "sigmoid", "routing.py", "if OVER_TOPK or j == 0:", "if j == 0:"),
    Mutation(
        "unstable-rank",
        "gaussian",
        "permutation.py",
        "place[None, :] + rank - 1",
        "place[None, :] + tl.sum(hit.to(tl.int64), 0)[None, :] - rank",
    ),
    Mutation("first-sequence-only", "gaussian", "permutation.py", "b = s * per_sequence", "b = 0 * s * per_sequence"),
    # Routing, backward
    Mutation("softmax-sign", "cosine", "routing_backward.py", "w_j * (dw_j - inner)", "w_j * (dw_j + inner)"),
    Mutation(
        "norm-gradient-sign",
        "cosine",
        "routing_backward.py",
        "-tl.sum(dscore * cosine, 1)",
        "tl.sum(dscore * cosine, 1)",
    ),
    Mutation(
        "temperature-sign",
        "cosine",
        "routing_backward.py",
        "-tl.sum(tl.sum(terms, 1), 0)",
        "tl.sum(tl.sum(terms, 1), 0)",
    ),
    Mutation("softplus-slope", "learned noise", "routing_backward.py", "(1.0 - tl.exp(-scale))", "tl.exp(-scale)"),
    Mutation("z-loss-halved", "sigmoid", "routing_backward.py", "dz * 2.0", "dz"),
    Mutation(
        "sigmoid-slope", "sigmoid", "routing_backward.py", "dlogits * logits * (1.0 - logits)", "dlogits * logits"
    ),
    Mutation("first-slice-only", "wide", "routing_backward.py", "tl.program_id(1) * SLICE", "tl.program_id(1) * 0"),
    # Experts
    Mutation("off-by-one-tile", "experts", "primitives.py", "(after <= tile)", "(after < tile)"),
    Mutation("gelu-slope-sign", "experts", "primitives.py", "+ z * density", "- z * density"),
    Mutation("truncated-bfloat16", "bfloat16", "primitives.py", "(bits + 0x7FFF + ((bits >> 16) & 1))", "bits"),
    Mutation("first-bias-dropped", "experts", "grouped_gemm.py", "z = starting_at(", "z = 0.0 * starting_at("),
    Mutation("second-bias-dropped", "experts", "grouped_gemm.py", "y = starting_at(", "y = 0.0 * starting_at("),
    Mutation("one-part-for-all", "last round", "last_round.py", "for part in range(parts)", "for part in range(1)"),
    Mutation("second-bias-in-each-part", "last round", "grouped_gemm.py", "tl.where(part == 0, O - o0, 0)", "O - o0"),
    Mutation("bias-of-the-gate-in-up", "gated", "grouped_gemm.py", "expert * H1 + H + h0", "expert * H1 + h0"),
    Mutation("w-missing-in-dz", "experts", "dz.py", "dz = w * da *", "dz = da *"),
    Mutation("up-missing-in-dz", "gated", "dz.py", "dz = dz * factor", "dz = dz"),
    Mutation("b2-missing-in-dw", "experts", "dz.py", "dw += dy.to(", "dw += 0.0 * dy.to("),
    Mutation(
        "w-missing-in-combine", "experts", "combine.py", "value = value * tl.load(", "value = value + 0.0 * tl.load("
    ),
    Mutation(
        "next-experts-rows-in-dW",
        "experts",
        "weight_grad.py",
        "mask=mask & live[:, None] if LAST else mask",
        "mask=mask",
    ),
    Mutation("w-missing-in-db2", "experts", "weight_grad.py", "terms *= tl.load(", "terms += 0.0 * tl.load("),
    Mutation("last-rows-only-in-db", "experts", "weight_grad.py", "total += terms", "total = terms"),
]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Makes a package of the kernels' sources, one of them changed, and returns its modules."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"kernels_of_{tmp_path.name}".replace("-", "_")

    def copy(mutation: Mutation | None = None) -> Kernels:
        folder = tmp_path / name
        shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            path = folder / mutation.file
            source = path.read_text()
            assert source.count(mutation.old) == 1, f"{mutation.file} has changed: rewrite {mutation.name}"
            path.write_text(source.replace(mutation.old, mutation.new))
        importlib.invalidate_caches()
        kernels = load_kernels(name)
        assert Path(kernels.dispatch.__file__).parent == folder
        return kernels

    yield copy
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize("check", CHECKS)
def test_checks_pass_on_a_copy(check, copied):
    CHECKS[check](copied())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation, copied):
    kernels = copied(mutation)
    with pytest.raises(AssertionError):
        CHECKS[mutation.check](kernels)
