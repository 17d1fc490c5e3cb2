"""Rows of results, the machine they come from, their JSON file, and what is derived from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from libmoe_fast.benchmarks.arena import COPY, OURS, Arena
from libmoe_fast.benchmarks.cases import Case
from libmoe_fast.benchmarks.measure import Contest, Spread
from libmoe_fast.benchmarks.memory import peak_bytes, saved_bytes
from libmoe_fast.compatibility import installed_version
from libmoe_fast.errors import ConfigError
from libmoe_fast.files import write_atomically

FORMAT = 2
PACKAGES = ("torch", "transformers", "triton", "st-moe-pytorch", "megablocks", "scattermoe", "kernels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One entrant in one case.

    time          seconds of a run: median and quartiles over the rounds
    limit         what the limit computes, and `limit_time` its seconds
    over_limit    time / limit, taken per round
    over_best     over_limit / that of the best peer (ours and the memory copy are none); None where there is no peer
    peak_bytes    the most that a run holds at a time beyond what was there; saved_bytes: kept for backward; both None
                  for the memory copy, for entrants so slow that they ran once, and in a growth series
    """

    subject: str
    case: str
    shape: str
    sizes: dict[str, int]
    tokens: int
    dtype: str
    mode: str
    router: str
    sweep: str | None
    entrant: str
    rounds: int
    time: Spread
    limit: str
    limit_time: Spread
    over_limit: Spread
    over_best: float | None
    peak_bytes: int | None
    saved_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.median

    @property
    def swept_value(self) -> int:
        return self.tokens if self.sweep == "T" else self.sizes[self.sweep]


def milliseconds(seconds: float) -> str:
    """Three digits or more, never with an exponent."""
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """An entrant that took no part in a case, and why."""

    case: str
    entrant: str
    reason: str


def rows_of(case: Case, arena: Arena, contest: Contest, device: torch.device) -> list[Row]:
    """The rows of a finished contest. Measures memory, with a few more runs of each entrant; not in a growth series."""
    ratios = {name: timing.over_limit for name, timing in contest.timings.items()}
    shape = case.shape
    sizes = {
        "D": shape.in_features,
        "H": shape.hidden_features,
        "O": shape.out_features,
        "N": shape.num_experts,
        "K": shape.top_k,
    }
    measured = [name for name in arena.entrants if not case.sweep and name not in (COPY, *contest.timed_once)]
    saved = {name: saved_bytes(arena.entrants[name]) for name in measured}
    peaks = peak_bytes(case, measured, device) if measured else {}
    rows = []
    for name, timing in contest.timings.items():
        peers = [ratio.median for other, ratio in ratios.items() if other not in (OURS, COPY)]
        rows.append(
            Row(
                subject=case.subject,
                case=case.id,
                shape=shape.name,
                sizes=sizes,
                tokens=case.tokens,
                dtype=case.dtype,
                mode=case.mode,
                router=case.router,
                sweep=case.sweep,
                entrant=name,
                rounds=len(timing.seconds),
                time=timing.time,
                limit=arena.limit_name,
                limit_time=timing.limit,
                over_limit=ratios[name],
                over_best=ratios[name].median / min(peers) if peers and name != COPY else None,
                peak_bytes=peaks.get(name),
                saved_bytes=saved.get(name),
            )
        )
    return rows


def skipped_of(case: Case, arena: Arena) -> list[Skipped]:
    return [Skipped(case=case.id, entrant=name, reason=reason) for name, reason in arena.skipped.items()]


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader must know to believe the numbers."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in ("libmoe_fast", *PACKAGES)},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# The file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    preset: str
    environment: dict[str, Any]
    rows: list[Row]
    skipped: list[Skipped]

    def write(self, path: Path) -> None:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        write_atomically(path, json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: str | os.PathLike) -> Results:
        """Raises ConfigError for a file that is not there, or that this version did not write."""
        try:
            content = json.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read the results in {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON; give a results.json that libmoe-fast bench wrote") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ConfigError(f"{path} holds results of format {found}, but this version reads {FORMAT}; run it again")
        return cls(
            preset=content["preset"],
            environment=content["environment"],
            rows=[_row(values) for values in content["rows"]],
            skipped=[Skipped(**values) for values in content["skipped"]],
        )


def _row(values: dict[str, Any]) -> Row:
    spreads = {name: Spread(*values[name]) for name in ("time", "limit_time", "over_limit")}
    return Row(**{**values, **spreads})


# ---------------------------------------------------------------------------------------------------------------------
# Growth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """A series of one entrant over one size: time per token ~ size ** exponent, fitted on a log-log scale.

    `expected` is the exponent of the work itself: a token costs as much however many tokens and experts there are,
    and in proportion to K and H.
    """

    letter: str
    entrant: str
    values: list[int]
    seconds_per_token: list[float]
    exponent: float
    expected: int


EXPECTED_EXPONENT = {"T": 0, "N": 0, "K": 1, "H": 1}


def growth_of(rows: Iterable[Row]) -> Iterator[Growth]:
    """The series in `rows`, by letter and entrant."""
    swept = sorted((r for r in rows if r.sweep), key=lambda r: (list(EXPECTED_EXPONENT).index(r.sweep), r.entrant))
    for (letter, entrant), group in itertools.groupby(swept, key=lambda r: (r.sweep, r.entrant)):
        points = sorted((row.swept_value, row.time.median / row.tokens) for row in group)
        values, seconds = map(list, zip(*points, strict=True))
        if len(values) > 1:
            yield Growth(
                letter=letter,
                entrant=entrant,
                values=values,
                seconds_per_token=seconds,
                exponent=slope(values, seconds),
                expected=EXPECTED_EXPONENT[letter],
            )


def slope(x: list[float], y: list[float]) -> float:
    """Of the straight line through (log x, log y)."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
