"""Whether runs differ by more than luck: in the questions that they were asked, and in the seeds they started from."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from libmoe_fast.analysis.runs import Run
from libmoe_fast.columns import BENCHMARKS

ROUNDS = 2000  # of the bootstrap
AT_A_TIME = 2**22  # numbers drawn at once


def question_scores(run: Run, column: str) -> dict[str, float] | None:
    """Question -> what its answer adds to the score of a column, whose mean is the score.

    None where that is not so (MME's points, scores of groups of questions), and where the samples are not there.
    """
    task, metrics, scale = _read_from(column)
    for evaluation in run.evaluations:
        path = evaluation / "samples" / f"{task}.jsonl"
        if path.is_file():
            values = _values(path, metrics, scale)
            if values and abs(statistics.fmean(values.values()) - run.scores[column]) <= 1e-6 * scale:
                return values
    return None


def _read_from(column: str) -> tuple[str, list[str], float]:
    if column in BENCHMARKS:
        benchmark = BENCHMARKS[column]
        return benchmark.task, [metric.partition(",")[0] for metric in benchmark.metrics], benchmark.scale
    task, _, metric = column.rpartition(" ")
    return task, [metric], 1.0


def _values(path: Path, metrics: Sequence[str], scale: float) -> dict[str, float] | None:
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        found = [sample.get(metric) for metric in metrics]
        if not all(isinstance(value, int | float) for value in found):
            return None
        values[str(sample.get("doc_id"))] = scale * sum(found)
    return values


def paired_bootstrap(
    first: Mapping[str, float], second: Mapping[str, float], *, rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """(difference of the means, first minus second; 2.5% and 97.5% of it) over questions drawn anew, each for both
    (Efron and Tibshirani 1993, section 13.3). The draws are the same at every call.

    Raises:
        ValueError: the questions are not the same, or none.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError("paired scores are of the same questions")
    differences = np.array([first[question] - second[question] for question in first])
    n, random = len(differences), np.random.default_rng(0)
    step = max(1, AT_A_TIME // n)
    means = [
        differences[random.integers(0, n, (min(step, rounds - done), n))].mean(1) for done in range(0, rounds, step)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def differences(runs: Sequence[Run]) -> list[tuple[str, Run, Run, tuple[float, float, float]]]:
    """Per column: the best MoE run against each of the others, of those that answered the same questions as most."""
    shown = [run for run in runs if run.router is not None]
    found = []
    for column in dict.fromkeys(column for run in shown for column in run.scores):
        ranked = sorted((run for run in shown if column in run.scores), key=lambda run: -run.scores[column])
        by_run = [(run, values) for run in ranked if (values := question_scores(run, column))]
        asked = Counter(frozenset(values) for _, values in by_run)
        alike = [(run, values) for run, values in by_run if values.keys() == asked.most_common(1)[0][0]]
        for run, values in alike[1:]:
            best, highest = alike[0]
            found.append((column, best, run, paired_bootstrap(highest, values)))
    return found


def over_seeds(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of the same settings but for the seed, two or more."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.settings is not None:
            groups[json.dumps(run.settings, sort_keys=True, default=str)].append(run)
    return [group for group in groups.values() if len(group) > 1]
