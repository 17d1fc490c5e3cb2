"""The columns of LibMoE's results table: task, metric, scale and judge of each, and how a score is read.

The tasks are lmms-eval's own; names, order and scale are those of the paper's table 2 (arXiv 2411.00918), with ChartQA,
which its section 4.1 names and the table leaves out, where the text has it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from libmoe_fast.errors import ConfigError, LibMoEError


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A column of the results table: the sum of `metrics` of an lmms-eval task, times `scale`.

    Args:
        repository: what the task loads from the hub, or from a folder laid out like it.
        judge: whose scorer asks a language model, see failed_judgements; none: nobody's.
    """

    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0
    repository: str = ""
    judge: str | None = None


_HUB = "lmms-lab-encoder"
# Those of scale 1 already report percent (MME: points).
BENCHMARKS = {
    "AI2D": Benchmark(task="ai2d", metrics=("exact_match,flexible-extract",), repository=f"{_HUB}/ai2d"),
    "ChartQA": Benchmark(task="chartqa", metrics=("relaxed_overall,none",), repository=f"{_HUB}/ChartQA"),
    "TextVQA": Benchmark(task="textvqa_val", metrics=("exact_match,none",), repository=f"{_HUB}/textvqa"),
    "GQA": Benchmark(task="gqa", metrics=("exact_match,none",), repository=f"{_HUB}/GQA"),
    "Hallusion": Benchmark(
        task="hallusion_bench_image",
        metrics=("aAcc,none",),
        scale=1,
        repository=f"{_HUB}/HallusionBench",
        judge="hallusion",
    ),
    "MathVista": Benchmark(
        task="mathvista_testmini_format",
        metrics=("llm_as_judge_eval,none",),
        scale=1,
        repository="AI4Math/MathVista",
        judge="mathvista",
    ),
    "MMBench EN": Benchmark(
        task="mmbench_en_dev_static", metrics=("gpt_eval_score,none",), scale=1, repository=f"{_HUB}/MMBench"
    ),
    "MMMU": Benchmark(task="mmmu_val", metrics=("mmmu_acc,none",), repository=f"{_HUB}/MMMU"),
    "MMStar": Benchmark(task="mmstar", metrics=("average,none",), repository="Lin-Chen/MMStar"),
    "POPE": Benchmark(task="pope", metrics=("pope_accuracy,none",), repository=f"{_HUB}/POPE"),
    # All 4,241 questions of the test split, those without an image too: the paper's "SQA Full".
    "ScienceQA": Benchmark(task="scienceqa", metrics=("exact_match,none",), repository=f"{_HUB}/ScienceQA"),
    "MME": Benchmark(
        task="mme",
        metrics=("mme_perception_score,none", "mme_cognition_score,none"),
        scale=1,
        repository=f"{_HUB}/MME",
    ),
    # Beside the suite: MMBench as the paper scores it, ScienceQA's questions that have an image, and the demo's two.
    "MMBench EN (judge)": Benchmark(
        task="mmbench_en_dev",
        metrics=("gpt_eval_score,none",),
        scale=1,
        repository=f"{_HUB}/MMBench",
        judge="mmbench",
    ),
    "ScienceQA img": Benchmark(task="scienceqa_img", metrics=("exact_match,none",), repository=f"{_HUB}/ScienceQA"),
    "digit": Benchmark(task="digits_digit", metrics=("accuracy,none",)),
    "parity": Benchmark(task="digits_parity", metrics=("accuracy,none",)),
}
SUITES = {"libmoe": tuple(BENCHMARKS)[:12]}
BY_TASK = {benchmark.task: (column, benchmark) for column, benchmark in BENCHMARKS.items()}

MMBENCH_TRIES = 3  # its scorer logs each


def task_name(name: str) -> str:
    """The lmms-eval task of a column, whatever the case; any other name is taken for a task's own."""
    columns = {column.lower(): benchmark.task for column, benchmark in BENCHMARKS.items()}
    return name if name in BY_TASK else columns.get(name.lower(), name)


def judge_key() -> str:
    """The environment variable that holds the key of the judge's API."""
    return "AZURE_API_KEY" if os.environ.get("API_TYPE") == "azure" else "OPENAI_API_KEY"


def check_judges(tasks: Sequence[str]) -> None:
    """Raises ConfigError for a judged task while no key is set: it would wait, then report a number all the same."""
    for task in tasks:
        if task in BY_TASK and BY_TASK[task][1].judge and not os.environ.get(judge_key()):
            raise ConfigError(
                f"{task} is scored by a GPT judge and {judge_key()} is not set: set it, or leave the task out "
                "(--skip_judged)"
            )


def failed_judgements(task: str, samples: Sequence[Mapping[str, Any]], logged: Sequence[str]) -> int:
    """How many answers of a judged task nobody judged. Scorers count them as wrong, draw lots, or take the judgement of
    the answer before; what tells is in the samples (MathVista: nothing extracted) or in what they log.
    """
    if task not in BY_TASK or (judge := BY_TASK[task][1].judge) is None:
        return 0
    if judge == "mathvista":
        judged = [sample["llm_as_judge_eval"] for sample in samples]
        answered = [any(str(answer).strip() for answer in sample["filtered_resps"]) for sample in samples]
        return sum(not one["extraction"] and given for one, given in zip(judged, answered, strict=True))
    if judge == "mmbench":
        return -(-sum("GPT API failed to answer" in line for line in logged) // MMBENCH_TRIES)
    failed, before = 0, ""
    for line in logged:  # a call that failed for good, and perhaps its missing words after it; or words of no such form
        no_words = "when extracting response" in line and "attempts failed" not in before
        failed += "attempts failed" in line or no_words
        before = line
    return failed


def scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """lmms-eval's `results` as score by column: LibMoE's columns, and "task metric" for every other task.

    Raises:
        LibMoEError: a task came without the number that was asked for.
    """
    columns: dict[str, float] = {}
    for task, metrics in results.items():
        numbers = {key: value for key, value in metrics.items() if _is_score(key, value)}
        if task in BY_TASK:
            name, benchmark = BY_TASK[task]
            if missing := [metric for metric in benchmark.metrics if metric not in numbers]:
                found = ", ".join(numbers) or "no number"
                raise LibMoEError(
                    f"lmms-eval reported no {missing[0]!r} for {task}, but {found}: see its messages above"
                )
            columns[name] = benchmark.scale * sum(numbers[metric] for metric in benchmark.metrics)
        elif numbers:
            columns.update({f"{task} {key.split(',')[0]}": value for key, value in numbers.items()})
        else:
            raise LibMoEError(f"lmms-eval reported no number for {task}: see its messages above")
    return columns


def _is_score(key: str, value: Any) -> bool:
    return "," in key and "stderr" not in key and isinstance(value, int | float) and not isinstance(value, bool)
