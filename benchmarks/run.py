"""A preset from start to folder: results.json, results.md and the plots."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from libmoe_fast.benchmarks.arena import OURS, Arena, build_arena
from libmoe_fast.benchmarks.cases import Case, Preset, find_preset
from libmoe_fast.benchmarks.measure import Contest, make_clock, make_flush, run_together
from libmoe_fast.benchmarks.results import Results, Row, Skipped, environment, rows_of, skipped_of
from libmoe_fast.errors import BackendError, ConfigError

MOST_THREADS = 4096


def run_preset(name: str, out: Path, *, device: str | None = None, threads: int | None = None) -> Results:
    """Measures every case of a preset and writes the report into `out`, after every case what there is so far.

    Raises ConfigError for an unknown preset or device, or a folder that cannot be written.
    """
    preset = find_preset(name)
    target = find_device(device or preset.device)
    try:
        from tqdm import tqdm

        from libmoe_fast.benchmarks.report import write_report
    except ImportError as error:
        raise ConfigError(f"benchmarks need {error.name}: pip install 'libmoe_fast[bench]'") from error
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise ConfigError(f"threads is {threads}; it must be from 1 to {MOST_THREADS}")
        torch.set_num_threads(threads)
    results = Results(preset=name, environment=environment(target), rows=[], skipped=[])
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(preset.cases), unit="case") as progress:
            for cases in races(preset.cases):
                progress.set_postfix_str(cases[0].id)
                rows, skipped = measure(cases, preset, target)
                gc.collect()  # a module and its hooks may be a cycle, and hold gigabytes
                results.rows.extend(rows)
                results.skipped.extend(skipped)
                results.write(out / "results.json")
                progress.update(len(cases))
        write_report(results, out)
    except OSError as error:
        raise ConfigError(f"cannot write the results into {out}: {error.strerror or error}") from error
    return results


def find_device(name: str | None) -> torch.device:
    """The device named, else a GPU if there is one. Raises ConfigError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no GPU; leave --device out, or install torch for CUDA")
    return torch.device(name)


def races(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """A growth series is one race, its sizes interleaved; every other case is a race of its own."""
    for _, group in itertools.groupby(cases, key=lambda case: case.sweep or case.id):
        yield list(group)


def measure(cases: Iterable[Case], preset: Preset, device: torch.device) -> tuple[list[Row], list[Skipped]]:
    """Builds the cases, times them in interleaved rounds, as many as fit, and measures memory.

    A case that cannot run is skipped.
    """
    arenas, skipped = {}, []
    for case in cases:
        try:
            arenas[case] = build_arena(case, device)
        except BackendError as error:
            skipped.append(Skipped(case=case.id, entrant=OURS, reason=str(error)))
    contests = {case: make_contest(arena, device) for case, arena in arenas.items()}
    one_round = sum(contest.warm_up(patience=preset.patience) for contest in contests.values())
    run_together(contests.values(), preset.rounds(one_round, cases=len(contests)))
    rows = []
    for case, arena in arenas.items():
        rows += rows_of(case, arena, contests[case], device)
        skipped += skipped_of(case, arena)
    return rows, skipped


def make_contest(arena: Arena, device: torch.device) -> Contest:
    return Contest(arena.entrants, limit=arena.make_limit(), clock=make_clock(device), flush=make_flush(device))
