"""How close one MoE layer on the CPU comes to its GEMMs alone: time / time of the same FLOPs as dense `mm(out=)`.

    python benchmarks/cpu_ratio.py                      # the table: every shape, ours and two other ways to run it
    python benchmarks/cpu_ratio.py --shape 64 --dtype bf16 --rounds 20
    python benchmarks/cpu_ratio.py --quick              # three rounds, ours only
    python benchmarks/cpu_ratio.py --routers            # the five routers beside each other
    python benchmarks/cpu_ratio.py --bf16               # ours in bf16 over ours in fp32
    python benchmarks/cpu_ratio.py --growth             # time per token from 256 to 16,384 tokens
    python benchmarks/cpu_ratio.py --memory             # kept for backward, and peak

Forward is inference, forward + backward is training with the auxiliary loss attached. All is timed in interleaved
rounds, the limit right before each run; what is printed are medians and quartiles over the rounds (measure.py). Lower
is better; below 1 beats torch's mm. `libmoe-fast bench --preset cpu` measures these layers against more peers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from libmoe_fast.benchmarks.arena import LOOP, OURS, Arena, build_arena, entrant, make_moe, random_tokens
from libmoe_fast.benchmarks.cases import CPU_TARGETS
from libmoe_fast.benchmarks.limits import dense_gemms
from libmoe_fast.benchmarks.measure import Contest, Entrant, Spread, Timing, make_clock, run_together
from libmoe_fast.benchmarks.memory import peak_bytes, saved_bytes
from libmoe_fast.benchmarks.report import spread
from libmoe_fast.errors import LibMoEError
from libmoe_fast.ops import ENVIRONMENT_VARIABLE
from libmoe_fast.routers import COMPARED

CPU = torch.device("cpu")
MODES = {"forward": "inference", "forward + backward": "fwd+bwd"}
PEERS = (LOOP, "grouped_mm")
CLIP_L = CPU_TARGETS[0]
GROWTH_TOKENS = [2**power for power in range(8, 15)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    os.environ[ENVIRONMENT_VARIABLE] = options.backend  # ours is this one or an error, never another
    try:
        options.subject(options)
    except LibMoEError as error:
        sys.exit(f"cpu_ratio: error: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group()
    for function in (routers, bf16, growth, memory):
        subject.add_argument(
            f"--{function.__name__}", dest="subject", action="store_const", const=function, help=function.__doc__
        )
    parser.add_argument("--shape", default="", help="only the shapes that begin with this, such as 64 or '2304, 1024'")
    parser.add_argument("--dtype", choices=sorted({t.dtype for t in CPU_TARGETS}), help="only this dtype")
    parser.add_argument("--only", choices=(OURS, *PEERS), help="only this implementation")
    parser.add_argument("--backend", default="cpu", help="what runs ours (default cpu)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--quick", action="store_true", help="three rounds, ours only")
    parser.set_defaults(subject=table)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.only = 3, OURS
    options.names = [options.only] if options.only else [OURS, *PEERS]
    options.targets = [t for t in CPU_TARGETS if t.sizes.startswith(options.shape) and options.dtype in (None, t.dtype)]
    if not options.targets:
        shapes = "; ".join(f"{t.sizes} {t.dtype}" for t in CPU_TARGETS)
        parser.error(f"no shape begins with {options.shape!r} in that dtype; there are {shapes}")
    return options


# ---------------------------------------------------------------------------------------------------------------------
# What it measures


def table(options: argparse.Namespace) -> None:
    """Every shape, beside the ratio to reach."""
    print_row("T, D, H, O, N, K", "dtype", "target", *options.names)
    print_row(*["---"] * (3 + len(options.names)))
    for target in options.targets:
        cells = {name: [] for name in options.names}
        for mode in MODES.values():
            arena = build_arena(target.case(mode, peers=PEERS), CPU)
            for name, timing in race(arena, options.names, options.rounds).items():
                cells[name].append(spread(timing.over_limit))
        goal = f"{target.inference:.2f} / {target.training:.2f}"
        print_row(target.sizes, target.dtype, goal, *map(" / ".join, cells.values()))


def routers(options: argparse.Namespace) -> None:
    """The five routers at CLIP-L in bf16, before the same experts and interleaved: time / limit and time / mean."""
    columns: dict[str, dict[str, Spread]] = {}
    for mode_name, mode in MODES.items():
        case, entrants, experts = CLIP_L.case(mode), {}, None
        x = random_tokens(case, CPU, features=CLIP_L.shape.in_features).requires_grad_()
        grad = random_tokens(case, CPU, features=CLIP_L.shape.out_features)
        for name in COMPARED:
            moe = make_moe(dataclasses.replace(case, router=name), CPU)
            experts = moe.experts = experts or moe.experts  # where weights lie in memory is worth as much as a router
            entrants[name] = entrant(case, partial(moe, x), module=moe, inputs=(x,), grad=grad)
        timings = race(Arena(entrants, "dense GEMM", partial(dense_gemms, case, CPU), {}), entrants, options.rounds)
        means = [statistics.mean(times) for times in zip(*(t.seconds for t in timings.values()), strict=True)]
        columns[f"{mode_name}, over the limit"] = {name: t.over_limit for name, t in timings.items()}
        columns[f"{mode_name}, over the mean"] = {
            name: Spread.of([seconds / mean for seconds, mean in zip(t.seconds, means, strict=True)])
            for name, t in timings.items()
        }
    print_row("router", *columns)
    print_row(*["---"] * (1 + len(columns)))
    for name in COMPARED:
        print_row(name, *(spread(column[name]) for column in columns.values()))
    medians = [[ratio.median for ratio in column.values()] for column in columns.values()]
    print_row("slowest / fastest (target 1.03)", *(f"{max(m) / min(m):.3f}" for m in medians))


def bf16(options: argparse.Namespace) -> None:
    """Layers in bf16 over the same in fp32, time / time. On AVX2, which multiplies in fp32, the target is 1.15."""
    print_row("T, D, H, O, N, K", *MODES)
    print_row(*["---"] * (1 + len(MODES)))
    for target in options.targets:
        if target.dtype != "bf16":
            continue
        ratios = []
        for mode in MODES.values():
            case = target.case(mode, peers=())
            wide = build_arena(dataclasses.replace(case, dtype="fp32"), CPU).entrants[OURS]

            def in_fp32(wide: Entrant = wide) -> None:
                wide.reset()
                wide.run()

            contest = Contest(build_arena(case, CPU).entrants, limit=in_fp32, clock=make_clock(CPU))
            contest.warm_up()
            contest.run(options.rounds)
            ratios.append(spread(contest.timings[OURS].over_limit))
        print_row(target.sizes, *ratios)


def growth(options: argparse.Namespace) -> None:
    """Time per token of forward and backward at CLIP-L in bf16, from few tokens to many, interleaved."""
    cases = [dataclasses.replace(CLIP_L, tokens=tokens).case("fwd+bwd", peers=()) for tokens in GROWTH_TOKENS]
    contests = [contest_of(build_arena(case, CPU), [OURS]) for case in cases]
    for contest in contests:
        contest.warm_up()
    run_together(contests, options.rounds)
    timings = [contest.timings[OURS] for contest in contests]
    per_token = [[s / tokens for s in t.seconds] for tokens, t in zip(GROWTH_TOKENS, timings, strict=True)]
    print_row("T", "µs per token", f"over that of T = {GROWTH_TOKENS[-1]}", "time / limit")
    print_row(*["---"] * 4)
    worst = 0.0
    for tokens, seconds, timing in zip(GROWTH_TOKENS, per_token, timings, strict=True):
        ratio = Spread.of([a / b for a, b in zip(seconds, per_token[-1], strict=True)])
        worst = max(worst, abs(ratio.median - 1))
        print_row(tokens, f"{Spread.of(seconds).median * 1e6:.2f}", spread(ratio), spread(timing.over_limit))
    print(f"\nLargest deviation {worst:.0%} (target 10%).")


def memory(options: argparse.Namespace) -> None:
    """What forward keeps for backward at CLIP-L in bf16, and the peak of both (memory.py says what counts)."""
    case, shape = CLIP_L.case("fwd+bwd", peers=PEERS), CLIP_L.shape
    least = 2 * case.tokens * (shape.in_features + shape.top_k * shape.hidden_features)  # of x [T, D] and z [T*K, H]
    entrants = build_arena(case, CPU).entrants
    saved = {name: saved_bytes(entrants[name]) for name in options.names}
    peaks = peak_bytes(case, options.names, CPU)
    print_row("layer", "kept for backward (MB)", "over 2TD + 2TKH", "peak (MB)", "over loop's (target 0.67)")
    print_row(*["---"] * 5)
    for name in options.names:
        peak = f"{peaks[name] / 1e6:.1f}" if peaks else "-"
        over_loop = f"{peaks[name] / peaks[LOOP]:.2f}" if LOOP in peaks else "-"
        print_row(name, f"{saved[name] / 1e6:.1f}", f"{saved[name] / least:.2f}", peak, over_loop)


# ---------------------------------------------------------------------------------------------------------------------


def race(arena: Arena, names: Iterable[str], rounds: int) -> dict[str, Timing]:
    contest = contest_of(arena, names)
    contest.warm_up()
    contest.run(rounds)
    return contest.timings


def contest_of(arena: Arena, names: Iterable[str]) -> Contest:
    return Contest({name: arena.entrants[name] for name in names}, limit=arena.make_limit(), clock=make_clock(CPU))


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
