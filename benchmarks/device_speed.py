"""How fast the kernels are on this GPU: every tile beside cuBLAS, layers beside their peers. A part of `make gpu`.

    python -m libmoe_fast.benchmarks.device_speed ceilings|tiles|tiles32|passes|layers|once [--json FILE] [--tiny]

    ceilings  what the GPU does at most: a copy in GB/s, a bf16 product of 8192 x 8192 x 8192 in TFLOP/s
    tiles     each candidate of the table of tiles, forced, and torch.mm of the same FLOPs right before it
    tiles32   the same in float32: in full precision, as three tf32 products, in tf32
    passes    every kernel that is no product, and a copy of as many bytes as it must move
    layers    a layer in eager mode and as a CUDA graph, its peers, and dense GEMMs as the limit
    once      forward and backward of a layer, for a profiler

Everything is interleaved with its limit, caches are flushed in between, times are medians of CUDA events. --tiny takes
sizes that Triton's interpreter can run, to try the program without a GPU: its numbers mean nothing.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from libmoe_fast.benchmarks.arena import OURS, build_arena
from libmoe_fast.benchmarks.cases import CLIP, FINE, SIGLIP, TINY, Case, Preset
from libmoe_fast.benchmarks.limits import copy_of
from libmoe_fast.benchmarks.measure import Contest, Entrant, make_clock, make_flush
from libmoe_fast.kernels.experts import FP32_VARIABLE
from libmoe_fast.kernels.primitives import INTERPRETED
from libmoe_fast.kernels.run import Launch, architecture, choosing, observing, run
from libmoe_fast.kernels.shapes import SHAPES, Shape, run_layer
from libmoe_fast.kernels.tiles import PRECISIONS, Tile
from libmoe_fast.kernels.traffic import flops, least

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GRAPH = "ours, CUDA graph"
ROUNDS = 20
TILE_TOKENS = (2308, 8192, 16384)
TINY_SHAPE = Shape(name="tiny", T=24, D=32, H=64, O=32, N=4, K=2)


def ceilings(tiny: bool) -> list[dict[str, Any]]:
    size, edge = (2**16, 32) if tiny else (2**31, 8192)
    a, b = (torch.randn(edge, edge, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    contest = race(
        {"copy": Entrant(copy_of(size, DEVICE)), "product": Entrant(lambda: torch.mm(a, b, out=out))},
        limit=lambda: None,
        rounds=2 if tiny else ROUNDS,
    )
    amounts = {"copy": (size / 1e9, "GB/s"), "product": (2 * edge**3 / 1e12, "TFLOP/s")}
    rows = []
    for name, (amount, unit) in amounts.items():
        median, low, high = (amount / seconds for seconds in contest.timings[name].time)
        rows.append({"name": name, "unit": unit, "median": median, "low": high, "high": low})
        print(f"{name}: {median:.4g} {unit}", flush=True)
    return rows


def tiles(tiny: bool) -> list[dict[str, Any]]:
    return [row for shape in shapes_of(tiny) for row in tile_rows(shape, torch.bfloat16, tiny)]


def shapes_of(tiny: bool) -> list[Shape]:
    return [TINY_SHAPE] if tiny else [replace(SHAPES[0], T=tokens, S=1) for tokens in TILE_TOKENS]


def tiles32(tiny: bool) -> list[dict[str, Any]]:
    """Beside torch.mm in full precision, tf32 beside its tf32."""
    rows = []
    for precision in PRECISIONS:
        os.environ[FP32_VARIABLE] = precision
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        rows += [
            {"precision": precision} | row for row in tile_rows(TINY_SHAPE if tiny else SHAPES[0], torch.float32, tiny)
        ]
    return rows


def tile_rows(shape: Shape, dtype: torch.dtype, tiny: bool) -> list[dict[str, Any]]:
    """Every candidate of the GEMMs of a layer."""
    return [
        row
        for launch in launches_of(shape, dtype)
        if launch.gemm is not None
        for row in candidate_rows(launch, shape, dtype, rounds=2 if tiny else ROUNDS)
    ]


def launches_of(shape: Shape, dtype: torch.dtype) -> list[Launch]:
    launches: list[Launch] = []
    with choosing(lambda gemm, found: found[0]), observing(launches.append):
        run_layer(shape, "smoe", dtype, DEVICE)
    return launches


def candidate_rows(launch: Launch, shape: Shape, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """The candidates of one launch, on its real arguments."""
    candidates = {tile.name: tile for tile in launch.tiles(architecture(DEVICE))}
    entrants = {name: graphed(Entrant(forced(launch, tile))) for name, tile in candidates.items()}
    sides = product_sides(launch, shape)
    contest = race(entrants, limit=product_of(*sides, dtype), rounds=rounds)
    work, rows = flops(launch, shape.rows), []
    for name, timing in contest.timings.items():
        row = {
            "T": shape.T,
            "gemm": launch.gemm,
            "sides": " x ".join(map(str, sides)),
            "tile": name,
            "us": timing.time.median * 1e6,
            "tflops": work / timing.time.median / 1e12,
            "of_cublas": 1 / timing.over_limit.median,
        }
        rows.append(row)
        print(
            f"T {row['T']:6} {row['gemm']:12} {row['sides']:20} {row['tile']:20} {row['us']:9.1f} us "
            f"{row['tflops']:7.1f} TFLOP/s {row['of_cublas']:6.1%} of cuBLAS",
            flush=True,
        )
    return rows


def passes(tiny: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes_of(tiny):
        for launch in launches_of(shape, torch.bfloat16):
            if launch.gemm is not None:
                continue
            entrant = graphed(Entrant(functools.partial(again, launch)))
            moved = least(launch).total
            contest = race({launch.name: entrant}, limit=copy_of(moved, DEVICE), rounds=2 if tiny else ROUNDS)
            timing = contest.timings[launch.name]
            row = {"T": shape.T, "kernel": launch.name, "MB": moved / 1e6, "us": timing.time.median * 1e6}
            row["of_copy"] = 1 / timing.over_limit.median
            rows.append(row)
            print(
                f"T {row['T']:6} {row['kernel']:16} {row['MB']:8.1f} MB {row['us']:9.1f} us "
                f"{row['of_copy']:6.1%} of a copy",
                flush=True,
            )
    return rows


def again(launch: Launch) -> None:
    run(launch.kernel, launch.grid, launch.gemm, device=DEVICE, itemsize=launch.itemsize, **launch.args)


def forced(launch: Launch, tile: Tile) -> Callable[[], None]:
    def once_more() -> None:
        with choosing(lambda gemm, found: tile):
            again(launch)

    return once_more


def product_sides(launch: Launch, shape: Shape) -> tuple[int, int, int]:
    """[M, K] x [K, N]: the launch's FLOPs as one dense product."""
    D, H, O, rows, up_rows = shape.D, shape.H, shape.O, shape.rows, shape.up_rows
    return {
        "up": (rows, D, up_rows),
        "down": (rows, H, O),
        "da": (rows, O, H),
        "dx": (rows, up_rows, D),
        "dw1": (up_rows, rows, D),
        "dw2": (O, rows, H),
    }[launch.gemm.removesuffix("_gated")]


def product_of(M: int, K: int, N: int, dtype: torch.dtype) -> Callable[[], Any]:
    """On random numbers: a GPU draws less power on zeros, and runs faster."""
    a = torch.randn(M, K, device=DEVICE, dtype=dtype)
    b = torch.randn(K, N, device=DEVICE, dtype=dtype)
    out = torch.empty(M, N, device=DEVICE, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def layers(tiny: bool) -> list[dict[str, Any]]:
    cases = [
        Case(subject="layer", shape=CLIP, tokens=2308, mode="inference"),
        Case(subject="layer", shape=CLIP, tokens=2308),
        Case(subject="layer", shape=CLIP, tokens=16384),
        Case(subject="layer", shape=SIGLIP, tokens=2048),
        Case(subject="layer", shape=FINE, tokens=2304),
        Case(subject="layer", shape=CLIP, tokens=2308, dtype="fp32"),
    ]
    if tiny:
        cases = [Case(subject="layer", shape=TINY, tokens=9, dtype="fp32")]
    preset = Preset(cases=tuple(cases), seconds=4, at_least=2, at_most=2 if tiny else ROUNDS)
    rows = []
    for case in preset.cases:
        arena = build_arena(case, DEVICE)
        entrants = dict(arena.entrants)
        entrants[GRAPH] = graphed(arena.entrants[OURS])
        contest = Contest(entrants, limit=arena.make_limit(), clock=make_clock(DEVICE), flush=make_flush(DEVICE))
        contest.run(preset.rounds(contest.warm_up(patience=2.0)))
        for name, timing in contest.timings.items():
            row = {"case": case.id, "entrant": name, "ms": timing.time.median * 1e3}
            row["over_limit"] = timing.over_limit.median
            rows.append(row)
            print(f"{case.id:36} {name:16} {row['ms']:9.3f} ms {row['over_limit']:7.2f} x the limit", flush=True)
        for name, reason in arena.skipped.items():
            print(f"{case.id:36} {name:16} left out: {reason}", flush=True)
    return rows


def graphed(entrant: Entrant) -> Entrant:
    """The same work as one CUDA graph, without the time that Python takes to launch it: longer than a small kernel's.

    Captured after warm-up on a stream of its own, as capture asks for. The interpreter has no graphs.
    """
    if DEVICE.type != "cuda":
        return entrant
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            entrant.reset()
            entrant.run()
    torch.cuda.current_stream().wait_stream(stream)
    entrant.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entrant.run()
    return Entrant(graph.replay, held=entrant.held)


def once(tiny: bool) -> list[dict[str, Any]]:
    run_layer(TINY_SHAPE if tiny else SHAPES[0], "smoe", torch.bfloat16, DEVICE)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return []


def race(entrants: dict[str, Entrant], *, limit: Callable[[], object], rounds: int) -> Contest:
    contest = Contest(entrants, limit=limit, clock=make_clock(DEVICE), flush=make_flush(DEVICE))
    contest.warm_up()
    contest.run(rounds)
    return contest


MEASURES = {"ceilings": ceilings, "tiles": tiles, "tiles32": tiles32, "passes": passes, "layers": layers, "once": once}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m libmoe_fast.benchmarks.device_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    options = parser.parse_args()
    rows = MEASURES[options.what](options.tiny)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
