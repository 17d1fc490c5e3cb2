"""Two result files side by side: what became slower, or holds more memory, beyond the noise."""

from __future__ import annotations

import dataclasses
import os

from libmoe_fast.benchmarks.arena import COPY
from libmoe_fast.benchmarks.report import mebibytes, spread, table
from libmoe_fast.benchmarks.results import Results, Row
from libmoe_fast.errors import ConfigError

TOLERANCE = 0.10
MEMORY_TOLERANCE = 0.05
VERDICTS = ("slower", "more memory", "faster", "same")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A row in both files. `verdict` is one of VERDICTS."""

    old: Row
    new: Row
    verdict: str

    @property
    def factor(self) -> float:
        return self.new.over_limit.median / self.old.over_limit.median


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`changes` of the rows in both files, `only_old` and `only_new`: how many are in one alone."""

    changes: list[Change]
    only_old: int
    only_new: int
    machines_differ: bool

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict in VERDICTS[:2]]

    def markdown(self) -> str:
        """What changed, worst first, and a sentence about the rest."""
        counts = ", ".join(f"{sum(c.verdict == v for c in self.changes)} {v}" for v in VERDICTS)
        parts = [f"{len(self.changes)} rows compared by time / limit: {counts}."]
        if self.only_old or self.only_new:
            parts.append(f"Not compared: {self.only_old} rows only in the old file, {self.only_new} only in the new.")
        if self.machines_differ:
            parts.append("The two files come from different machines, thread counts or torch versions.")
        changed = sorted((c for c in self.changes if c.verdict != "same"), key=lambda c: -c.factor)
        if changed:
            parts.append("\n" + _table(changed))
        return "\n".join(parts)


def compare_files(old: str | os.PathLike, new: str | os.PathLike, *, tolerance: float = TOLERANCE) -> Comparison:
    """Compares the rows that two files share. Raises ConfigError for files that are none or share no row."""
    if tolerance < 0:
        raise ConfigError(f"tolerance is {tolerance}; it may not be negative")
    before, after = Results.read(old), Results.read(new)
    old_rows, new_rows = ({(r.case, r.entrant): r for r in results.rows} for results in (before, after))
    shared = [key for key in old_rows if key in new_rows]
    if not shared:
        raise ConfigError(f"{old} ({before.preset}) and {new} ({after.preset}) have no row in common; use one preset")
    return Comparison(
        changes=[
            Change(old=old_rows[key], new=new_rows[key], verdict=judge(old_rows[key], new_rows[key], tolerance))
            for key in shared
            if key[1] != COPY
        ],
        only_old=len(old_rows) - len(shared),
        only_new=len(new_rows) - len(shared),
        machines_differ=any(before.environment[key] != after.environment[key] for key in ("cpu", "gpu", "threads"))
        or before.environment["versions"]["torch"] != after.environment["versions"]["torch"],
    )


def judge(old: Row, new: Row, tolerance: float) -> str:
    """Time counts as changed where the medians differ by more than `tolerance` and the quartiles do not overlap.

    Time / limit is compared, so that a machine that is slower today does not look like slower code. Memory has next to
    no noise (resident memory up to 3%): more of it is a regression beyond MEMORY_TOLERANCE.
    """
    before, after = old.over_limit, new.over_limit
    if after.median > before.median * (1 + tolerance) and after.low > before.high:
        return "slower"
    for field in ("peak_bytes", "saved_bytes"):
        if (getattr(new, field) or 0) > (getattr(old, field) or 0) * (1 + MEMORY_TOLERANCE):
            return "more memory"
    if after.median < before.median / (1 + tolerance) and after.high < before.low:
        return "faster"
    return "same"


def _table(changes: list[Change]) -> str:
    rows = [
        [
            c.verdict,
            c.old.case,
            c.old.entrant,
            spread(c.old.over_limit),
            spread(c.new.over_limit),
            f"{c.factor:.2f}",
            f"{mebibytes(c.old.peak_bytes)} -> {mebibytes(c.new.peak_bytes)}",
        ]
        for c in changes
    ]
    headers = ["", "case", "", "time / limit before", "after", "factor", "peak (MiB)"]
    return table(headers, rows, left=(0, 1, 2))
