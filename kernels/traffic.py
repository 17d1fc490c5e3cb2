"""Bytes that each launch of a layer moves, counted, and the time floor that follows on known GPUs.

    python -m libmoe_fast.kernels.traffic [--shape CLIP-L] [--markdown]

First the formulas below are held against the kernels: a small layer runs in Triton's interpreter, which counts every
byte that is loaded and stored. Then the real layers, by formula, with the first tile of each architecture: the least
possible (each input read once, each output written once), what is requested with tile re-reads (L2 serves most of
them), and the floor in microseconds from published bandwidth and matrix rate. Beside it, the bytes of the same layer as
separate PyTorch operators. Exit code 1 if a count and its formula differ by more than 5%.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .dispatch import BlockSums, LossValues, Permuted, Routed
from .last_round import LEAST_STEPS, MOST_PARTS
from .primitives import INTERPRETED
from .run import INTERPRETER_PROGRAMS, Launch, cdiv, observing
from .shapes import SHAPES, Shape, layer_launches, run_layer
from .weight_grad import DB_COLUMNS

TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class GPU:
    """Published peaks: memory bandwidth in bytes/s, dense bf16 matrix rate in FLOP/s."""

    architecture: str
    processors: int
    bandwidth: float
    flops: float


GPUS = {
    "A100": GPU(architecture="sm80", processors=108, bandwidth=2.039e12, flops=312e12),
    "H100": GPU(architecture="sm90", processors=132, bandwidth=3.35e12, flops=989e12),
    "H200": GPU(architecture="sm90", processors=132, bandwidth=4.8e12, flops=989e12),
    "B200": GPU(architecture="sm100", processors=148, bandwidth=8.0e12, flops=2250e12),
}

# Pointer arguments that a kernel writes; all others it reads.
OUTPUTS = {
    "route": (*Routed._fields, *BlockSums._fields),
    "permute": (*Permuted._fields, *LossValues._fields),
    "up": ("z", "a"),
    "down": ("y",),
    "expand": ("out",),
    "combine": ("y",),
    "back": ("out",),
    "dz": ("dz", "wa", "dweights"),
    "weight_grad": ("dw", "db"),
    "route_backward": ("dx", "ddot", "dnoise", "dbias", "dw_norm", "dtemperature"),
    "router_grad": ("parts",),
    "router_reduce": ("dw", "dnoise_w", "dbias", "dtemperature"),
}
# Scratch of a shared last round, neither input nor output; and what is `left` once more.
NOT_COUNTED = ("slots", "flags", "terms")
NORMS_ONLY = {"route_backward": "x", "router_reduce": "w"}  # arguments that only the gradient of a norm reads


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one launch."""

    loads: int
    stores: int

    @property
    def total(self) -> int:
        return self.loads + self.stores


def tensors(launch: Launch) -> dict[str, Tensor]:
    """Argument name without its suffix -> tensor, descriptors included."""
    found = {}
    for name, value in launch.args.items():
        tensor = value.base if hasattr(value, "block_shape") else value
        if isinstance(tensor, Tensor) and name.removesuffix("_ptr") not in NOT_COUNTED:
            found[name.removesuffix("_ptr")] = tensor
    if launch.name in NORMS_ONLY and not launch.args["COSINE"]:
        del found[NORMS_ONLY[launch.name]]
    return found


def least(launch: Launch) -> Traffic:
    """Each input read once, each output written once."""
    sizes = {name: tensor.nbytes for name, tensor in tensors(launch).items()}
    outputs = sum(size for name, size in sizes.items() if name in OUTPUTS[launch.name])
    return Traffic(loads=sum(sizes.values()) - outputs, stores=outputs)


def flops(launch: Launch, rows: int) -> int:
    """Floating-point operations of a GEMM launch over `rows` choices; the others' are negligible."""
    a = launch.args
    sides = {
        "up": lambda: a["D"] * a["H"] * (2 if a["GATED"] else 1),
        "down": lambda: a["H"] * a["O"],
        "back": lambda: a["M"] * a["C"],
        "weight_grad": lambda: a["M"] * a["C"],
    }
    return 2 * rows * sides[launch.name]() if launch.name in sides else 0


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels request, by formula


def requested(launch: Launch, meta: dict[str, int], loads: list[int]) -> Traffic:
    """Bytes loaded and stored, tile re-reads included. meta: the tile, and the device's "processors"; loads: rows per
    expert.
    """
    return FORMULAS[launch.name](launch, meta, loads)


def _gemm(
    launch: Launch, meta: dict, loads: list[int], *, width: int, depth: int, weights: int = 1
) -> tuple[int, int, int]:
    """(row tiles, column tiles, bytes of operands) of [rows, depth] times each of some weights [depth, width]."""
    row_tiles = sum(cdiv(rows, meta["BM"]) for rows in loads)
    column_tiles = cdiv(width, meta["BN"])
    operands = sum(loads) * depth * column_tiles + row_tiles * depth * width * weights
    return row_tiles, column_tiles, operands * launch.itemsize


def _slots(meta: dict, loads: list[int], *, width: int, depth: int) -> int:
    """Bytes of the slots through which the programs share the last round, each written and read once."""
    column_tiles = cdiv(width, meta["BN"])
    most = (cdiv(sum(loads), meta["BM"]) + len(loads) - 1) * column_tiles
    programs = min(meta["processors"] * meta["PROGRAMS"], most)
    left = sum(cdiv(rows, meta["BM"]) for rows in loads) * column_tiles % programs
    steps = cdiv(depth, meta["BK"]) // LEAST_STEPS.value
    parts = min(programs // max(left, 1), steps, MOST_PARTS.value)
    return 4 * left * parts * meta["BM"] * meta["BN"] if parts > 1 else 0


def _up(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    a, rows, size = launch.args, sum(loads), launch.itemsize
    weights = 2 if a["GATED"] else 1
    row_tiles, column_tiles, operands = _gemm(launch, meta, loads, width=a["H"], depth=a["D"], weights=weights)
    bias = row_tiles * a["H"] * weights * size if a["BIAS"] else 0
    z = rows * a["H"] * weights * size if a["STORE_Z"] else 0
    return Traffic(loads=operands + bias + 8 * rows * column_tiles, stores=z + rows * a["H"] * size)


def _down(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    a = launch.args
    row_tiles, _, operands = _gemm(launch, meta, loads, width=a["O"], depth=a["H"])
    bias = row_tiles * a["O"] * launch.itemsize if a["BIAS"] else 0
    slots = _slots(meta, loads, width=a["O"], depth=a["H"])
    return Traffic(loads=operands + bias + slots, stores=sum(loads) * a["O"] * launch.itemsize + slots)


def _back(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    a = launch.args
    _, _, operands = _gemm(launch, meta, loads, width=a["C"], depth=a["M"])
    out = tensors(launch)["out"].nbytes
    slots = _slots(meta, loads, width=a["C"], depth=a["M"])
    return Traffic(loads=operands + slots, stores=out + slots)


def _dz(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    """The tokens' rows of dy, and b2, are read for each choice."""
    found, a, rows = tensors(launch), launch.args, sum(loads)
    bias = 2 * rows * a["O"] * found["dy"].itemsize if a["BIAS"] else 0
    choices = (8 + 4) * rows  # order and weights
    return Traffic(loads=found["da"].nbytes + found["z"].nbytes + bias + choices, stores=least(launch).stores)


def _weight_grad(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    a, rows, size = launch.args, sum(loads), launch.itemsize
    operands = rows * (a["M"] * cdiv(a["C"], meta["BN"]) + a["C"] * cdiv(a["M"], meta["BM"])) * size
    bias = rows * a["M"] * size if a["BIAS"] else 0  # the terms, by programs of their own
    weights = (8 + 4) * rows * cdiv(a["M"], DB_COLUMNS.value) if a["BIAS"] and a["WEIGHTED"] else 0
    grads = len(loads) * a["M"] * (a["C"] + (1 if a["BIAS"] else 0)) * size
    return Traffic(loads=operands + bias + weights, stores=grads)


def _expand(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    """A token's row is read for each of its choices."""
    a, rows, out = launch.args, sum(loads), tensors(launch)["out"].nbytes
    return Traffic(loads=out + 8 * rows * cdiv(a["C"], a["BC"]), stores=out)


def _combine(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    a = launch.args
    column_tiles = cdiv(a["O"], a["BO"])
    choices = a["T"] * a["K"] * column_tiles * (8 + (4 if a["WEIGHTED"] else 0))
    once = least(launch)
    return Traffic(loads=tensors(launch)["rows"].nbytes + choices, stores=once.stores)


def _route(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    """Every block reads all of W."""
    found, once = tensors(launch), least(launch)
    return Traffic(loads=once.loads + (launch.grid({})[0] - 1) * found["w"].nbytes, stores=once.stores)


def _permute(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    """Every program reads the counts of all blocks."""
    found, once = tensors(launch), least(launch)
    return Traffic(loads=once.loads + (launch.grid({})[0] - 1) * found["counts"].nbytes, stores=once.stores)


def _route_backward(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    """Every block reads all of W; once per step of D the permutation and what it wrote itself, the gradients of scores;
    weights and choices K-fold for the gates; and for each further slice of D all that scores' gradients are made of.
    """
    found, once = tensors(launch), least(launch)
    blocks, slices = launch.grid({})
    steps = cdiv(launch.args["D"], launch.args["BD"])
    whole = ("x", "w", "dxs", "inverse", "noise_w", "first_share", *OUTPUTS["route_backward"])
    scores = sum(tensor.nbytes for name, tensor in found.items() if name not in whole)
    shares = 4 * launch.args["N"]
    again = (
        (blocks - 1) * found["w"].nbytes
        + (steps * found["ddot"].nbytes if launch.args["NP"] > launch.args["BN"] else 0)
        + (steps - 1) * found["inverse"].nbytes
        + slices * (found["weights"].nbytes + found["dweights"].nbytes)
        + (slices - 1) * scores
        + (blocks * slices - found["first_share"].shape[0]) * shares
    )
    return Traffic(loads=once.loads + again, stores=once.stores)


def _router_grad(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    found, once = tensors(launch), least(launch)
    steps = cdiv(launch.args["D"], launch.args["BD"])
    return Traffic(loads=once.loads + (steps - 1) * found["ddot"].nbytes, stores=once.stores)


def _router_reduce(launch: Launch, meta: dict, loads: list[int]) -> Traffic:
    found, once = tensors(launch), least(launch)
    if launch.args["COSINE"]:
        steps = launch.grid({})[0]
        return Traffic(loads=once.loads + (steps - 1) * found["dw_norm"].nbytes, stores=once.stores)
    return Traffic(loads=found["parts"].nbytes, stores=once.stores)


FORMULAS: dict[str, Callable[[Launch, dict, list[int]], Traffic]] = {
    "route": _route,
    "permute": _permute,
    "up": _up,
    "down": _down,
    "expand": _expand,
    "combine": _combine,
    "back": _back,
    "dz": _dz,
    "weight_grad": _weight_grad,
    "route_backward": _route_backward,
    "router_grad": _router_grad,
    "router_reduce": _router_reduce,
}


# ---------------------------------------------------------------------------------------------------------------------
# What the kernels request, counted in the interpreter


class Counter:
    """Counts the bytes that interpreted kernels load and store, per launch."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.counts: list[dict[str, int]] = []

    def seen(self, launch: Launch) -> None:
        self.launches.append(launch)
        self.counts.append({"loads": 0, "stores": 0})

    def __enter__(self) -> "Counter":
        from triton.runtime import interpreter

        self._builder = interpreter.InterpreterBuilder
        self._originals = {name: getattr(self._builder, name) for name in ("create_masked_load", "create_masked_store")}
        for kind, name in (("loads", "create_masked_load"), ("stores", "create_masked_store")):
            setattr(self._builder, name, self._counting(kind, self._originals[name]))
        return self

    def __exit__(self, *error) -> None:
        for name, original in self._originals.items():
            setattr(self._builder, name, original)

    def _counting(self, kind: str, original: Callable) -> Callable:
        def counted(builder, pointers, *rest, **options):
            mask = rest[0] if kind == "loads" else rest[1]
            bits = pointers.get_element_ty().primitive_bitwidth
            self.counts[-1][kind] += int(mask.data.sum()) * bits // 8
            return original(builder, pointers, *rest, **options)

        return counted


# Small enough to interpret, large enough that what the formulas leave out (offsets, scalars) does not show.
SMALL = (
    Shape(name="plain", T=320, D=128, H=256, O=192, N=4, K=2, S=2),
    Shape(name="gated", T=256, D=288, H=128, O=128, N=8, K=3, activation="silu", gated=True),
)


def checked(shape: Shape) -> list[tuple[str, Traffic, Traffic]]:
    """(launch, counted, formula) of a layer that runs in the interpreter."""
    torch.manual_seed(0)
    counter = Counter()
    with counter, observing(counter.seen):
        run_layer(shape, "cosine", torch.bfloat16, torch.device("cpu"))
    offsets = next(tensors(launch)["offsets"] for launch in counter.launches if launch.name == "up")
    loads = offsets.diff().tolist()
    rows = []
    for launch, count in zip(counter.launches, counter.counts, strict=True):
        meta = launch.tiles("interpreter")[0].sizes if launch.gemm else {}
        formula = requested(launch, meta | {"processors": INTERPRETER_PROGRAMS}, loads)
        rows.append((launch.name, Traffic(**count), formula))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The same layer as separate PyTorch operators


class OperatorBytes(TorchDispatchMode):
    """Adds up the bytes of inputs and outputs of every operator that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view and "empty" not in operator.name():
            flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.total += sum(t.untyped_storage().nbytes() for t in flat if isinstance(t, Tensor))
        return result


def unfused_bytes(shape: Shape) -> int:
    """Bytes of one training step of the layer on torch.grouped_mm: sort, gather, GEMM, bias, activation, GEMM, bias,
    weigh, un-sort, sum, and their backward, as transformers writes it.
    """
    bf16, counter = torch.bfloat16, OperatorBytes()
    with FakeTensorMode(), counter:
        T, D, H, O, N, K = shape.T, shape.D, shape.H, shape.O, shape.N, shape.K
        sizes = {"x": (T, D), "gate": (N, D), "w1": (N, shape.up_rows, D), "b1": (N, shape.up_rows)}
        sizes |= {"w2": (N, O, H), "b2": (N, O)}
        x, gate, w1, b1, w2, b2 = (torch.empty(size, dtype=bf16, requires_grad=True) for size in sizes.values())
        counter.total = 0  # making the inputs is not the layer's
        weights, index = F.linear(x.float(), gate.float()).softmax(-1).topk(K, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(bf16)
        experts, order = index.flatten().sort(stable=True)
        offsets = F.one_hot(experts, N).sum(0).cumsum(0).int()
        z = F.grouped_mm(x[order // K], w1.transpose(1, 2), offs=offsets) + b1[experts]
        a = F.silu(z[:, :H]) * z[:, H:] if shape.gated else F.gelu(z)
        y = (F.grouped_mm(a, w2.transpose(1, 2), offs=offsets) + b2[experts]) * weights.flatten()[order, None]
        y[order.argsort()].view(T, K, O).sum(1).backward(torch.empty(T, O, dtype=bf16))
    return counter.total


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def check_table() -> tuple[list[list[str]], bool]:
    table, good = [["layer", "launch", "counted MB", "formula MB", "difference"]], True
    for shape in SMALL:
        for name, counted, formula in checked(shape):
            difference = formula.total / counted.total - 1
            good &= abs(difference) <= TOLERANCE
            megabytes = [f"{traffic.total / 1e6:.3f}" for traffic in (counted, formula)]
            table.append([shape.name, name, *megabytes, f"{difference:+.1%}"])
    return table, good


def floor_table(shape: Shape) -> list[list[str]]:
    """Launch by launch: least bytes, re-read factor, FLOPs, and the floor on each GPU."""
    header = ["launch", "least MB", "GFLOP", *(f"{name} us (re-reads)" for name in GPUS)]
    even = [shape.rows // shape.N] * shape.N
    launches = {arch: layer_launches(shape, arch) for arch in {gpu.architecture for gpu in GPUS.values()}}
    table, sums = [header], dict.fromkeys(GPUS, 0.0)
    for i, launch in enumerate(launches["sm90"]):
        once, work = least(launch), flops(launch, shape.rows)
        row = [launch.name, f"{once.total / 1e6:.1f}", f"{work / 1e9:.1f}" if work else ""]
        for name, gpu in GPUS.items():
            here = launches[gpu.architecture][i]
            meta = here.tiles(gpu.architecture)[0].sizes if here.gemm else {}
            meta = meta | {"processors": gpu.processors}
            seconds = max(least(here).total / gpu.bandwidth, work / gpu.flops)
            sums[name] += seconds
            row.append(f"{seconds * 1e6:.1f} ({requested(here, meta, even).total / least(here).total:.1f}x)")
        table.append(row)
    total = sum(least(launch).total for launch in launches["sm90"])
    table.append(["all", f"{total / 1e6:.1f}", "", *(f"{seconds * 1e6:.0f}" for seconds in sums.values())])
    return table


def print_table(table: list[list[str]], markdown: bool) -> None:
    from tabulate import tabulate

    print(tabulate(table[1:], table[0], tablefmt="github" if markdown else "simple", disable_numparse=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m libmoe_fast.kernels.traffic", description=__doc__.split("\n\n")[0])
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shape", choices=names, nargs="+", default=names, help="layers (all)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(arguments)
    if not INTERPRETED:  # the variable must be there before Triton is imported
        again = [
            sys.executable,
            "-m",
            "libmoe_fast.kernels.traffic",
            *(sys.argv[1:] if arguments is None else arguments),
        ]
        return subprocess.run(again, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    table, good = check_table()
    print("Formulas against counts in the interpreter (bf16, cosine router)\n")
    print_table(table, options.markdown)
    for shape in (shape for shape in SHAPES if shape.name in options.shape):
        print(f"\n{shape.name}: T {shape.T}, D {shape.D}, H {shape.H}, O {shape.O}, N {shape.N}, K {shape.K}")
        print("one training step in bf16; floor: the larger of least bytes / bandwidth and FLOPs / matrix rate\n")
        table = floor_table(shape)
        print_table(table, options.markdown)
        fused = sum(least(launch).total for launch in layer_launches(shape, "sm90"))
        unfused = unfused_bytes(shape)
        print(f"\nas separate PyTorch operators: {unfused / 1e6:.1f} MB, {unfused / fused:.2f} times the bytes")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
