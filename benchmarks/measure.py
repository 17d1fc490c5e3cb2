"""Timing: interleaved rounds of entrants, each right after a limit, by one clock for CPU and GPU.

    contest = Contest({"ours": Entrant(run), "peer": Entrant(other)}, limit=mm, clock=make_clock(device))
    contest.run(rounds=9)
    contest.timings["ours"].over_limit   # Spread: median, first and third quartile of time / limit

In every round each entrant runs right after the limit, and time / limit is taken per round: a machine that is busy for
a while slows both. One round more, not counted, warms up.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Larger than the second-level cache of any GPU (H100: 50 MB, B200: 126 MB).
FLUSH_BYTES = 256 * 2**20
FAR_BEHIND = 4.0


def nothing() -> None:
    pass


class Entrant(NamedTuple):
    """Something to time.

    run      what is timed
    reset    runs before it, not timed: drops the gradients of the last round
    held     tensors that are there anyway (parameters): not counted as saved for backward
    """

    run: Callable[[], object]
    reset: Callable[[], None] = nothing
    held: tuple[Tensor, ...] = ()


class Spread(NamedTuple):
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


class Timing:
    """Times of one entrant and of the limit right before it, round by round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.limit_seconds: list[float] = []

    @property
    def time(self) -> Spread:
        return Spread.of(self.seconds)

    @property
    def limit(self) -> Spread:
        return Spread.of(self.limit_seconds)

    @property
    def over_limit(self) -> Spread:
        return Spread.of([t / limit for t, limit in zip(self.seconds, self.limit_seconds, strict=True)])


class Contest:
    """Rounds of `entrants`, the first of them being the one that the others are compared with.

    `others` and `first` are the two halves of a round, so that something else (pytest-benchmark) can time the first.
    """

    def __init__(
        self, entrants: Mapping[str, Entrant], *, limit: Callable[[], object], clock: Callable[[], Any], flush=nothing
    ) -> None:
        self.entrants, self.limit, self.clock, self.flush = dict(entrants), limit, clock, flush
        self.first_name, *self.other_names = self.entrants
        self.timed_once: list[str] = []
        self.timings = {name: Timing() for name in self.entrants}

    def run(self, rounds: int) -> None:
        """`rounds` whole rounds; call `warm_up` before."""
        for _ in range(rounds):
            self.others()
            self.first()

    def warm_up(self, *, patience: float = math.inf) -> float:
        """One round that does not count; returns how many seconds a round takes.

        Of entrants that took longer than `patience` seconds and FAR_BEHIND times the first it does count, and they run
        no more: one peer that is a hundred times slower would take a hundred times as long as the rest of the table.
        """
        start = time.perf_counter()
        self.run(1)
        taken = time.perf_counter() - start
        most = max(patience, FAR_BEHIND * self.timings[self.first_name].seconds[0])
        self.timed_once = [name for name in self.other_names if self.timings[name].seconds[0] > most]
        self.other_names = [name for name in self.other_names if name not in self.timed_once]
        for name, timing in self.timings.items():
            if name in self.timed_once:
                taken -= timing.seconds[0]
            else:
                timing.seconds.clear()
                timing.limit_seconds.clear()
        return taken

    def others(self) -> None:
        """All but the first, and what must come before the first: its limit, its reset, the flush."""
        for name in self.other_names:
            self._before(name)
            self.timings[name].seconds.append(self._seconds(self.entrants[name].run))
        self._before(self.first_name)

    def first(self) -> None:
        self.timings[self.first_name].seconds.append(self._seconds(self.entrants[self.first_name].run))

    def _before(self, name: str) -> None:
        self.flush()
        self.timings[name].limit_seconds.append(self._seconds(self.limit))
        self.entrants[name].reset()
        self.flush()

    def _seconds(self, function: Callable[[], object]) -> float:
        start = self.clock()
        function()
        return self.clock() - start


def run_together(contests: Iterable[Contest], rounds: int) -> None:
    """`rounds` rounds of all contests, interleaved: what slows the machine for a while slows them all alike."""
    for _ in range(rounds):
        for contest in contests:
            contest.run(1)


# ---------------------------------------------------------------------------------------------------------------------
# The clock


class Stamp:
    """A moment on the GPU's own clock. Subtracting two waits for the later one, so that stamping never does."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Stamp) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def make_clock(device: torch.device) -> Callable[[], Any]:
    """A function whose results subtract to seconds: CUDA events on a GPU, the process's clock on the CPU."""
    return Stamp if device.type == "cuda" else time.perf_counter


def make_flush(device: torch.device) -> Callable[[], None]:
    """Empties the GPU's caches between runs, and keeps its queue busy while the next is launched, as do_bench.

    On the CPU the limit, which runs before every entrant, has gone through more memory than the caches hold.
    """
    if device.type != "cuda":
        return nothing
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    return lambda: buffer.zero_()
