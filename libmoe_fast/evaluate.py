"""Evaluating a checkpoint through lmms-eval: scores, predictions and expert-selection counts in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from libmoe_fast import compatibility
from libmoe_fast.analysis.results import FORMAT, RESULTS, ROUTING, read_results
from libmoe_fast.errors import CheckpointError, ConfigError, LibMoEError
from libmoe_fast.files import write_atomically


@dataclass(frozen=True)
class Benchmark:
    """A column of the results table: the sum of `metrics` of an lmms-eval task, times `scale`."""

    task: str
    metrics: tuple[str, ...]
    scale: float = 100.0
    judged: bool = False


# LibMoE's benchmarks. Those of scale 1 already report percent (MME: points).
BENCHMARKS = {
    "AI2D": Benchmark("ai2d", ("exact_match,flexible-extract",)),
    "ChartQA": Benchmark("chartqa", ("relaxed_overall,none",)),
    "TextVQA": Benchmark("textvqa_val", ("exact_match,none",)),
    "GQA": Benchmark("gqa", ("exact_match,none",)),
    "Hallusion": Benchmark("hallusion_bench_image", ("aAcc,none",), scale=1, judged=True),
    "MathVista": Benchmark("mathvista_testmini_format", ("llm_as_judge_eval,none",), scale=1, judged=True),
    "MMBench EN": Benchmark("mmbench_en_dev_static", ("gpt_eval_score,none",), scale=1),
    "MME": Benchmark("mme", ("mme_perception_score,none", "mme_cognition_score,none"), scale=1),
    "MMMU": Benchmark("mmmu_val", ("mmmu_acc,none",)),
    "MMStar": Benchmark("mmstar", ("average,none",)),
    "POPE": Benchmark("pope", ("pope_accuracy,none",)),
    "ScienceQA": Benchmark("scienceqa_full", ("exact_match,none",)),
    "ScienceQA img": Benchmark("scienceqa_img", ("exact_match,none",)),
    "digit": Benchmark("digits_digit", ("accuracy,none",)),
    "parity": Benchmark("digits_parity", ("accuracy,none",)),
}


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is evaluated, and on what.

    Args:
        tasks: lmms-eval tasks, or columns of BENCHMARKS
        out: folder for results.json, routing.json and the predictions; default: eval/ beside the checkpoint
        include_path: folders with further lmms-eval task files
        batch_size: questions per forward pass
        limit: only the first so many questions of each task, for a quick look
        dtype: arithmetic of the model; auto keeps the checkpoint's
        device: cuda, cpu, ...; auto takes the GPU if there is one
        backend: engine that runs the experts; none given = the best one here
        image_aspect: "pad" makes images square as training does; auto does what the checkpoint was trained with
        max_new_tokens: longest answer, for tasks that do not say
    """

    tasks: list[str] = field(default_factory=list)
    out: str | None = None
    include_path: list[str] = field(default_factory=list)
    batch_size: int = 16
    limit: int | None = None
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: str = "auto"
    backend: str | None = None
    image_aspect: Literal["auto", "pad", "none"] = "auto"
    max_new_tokens: int = 128


def evaluate(checkpoint: str | os.PathLike, config: EvaluateConfig) -> dict[str, float]:
    """Evaluate and return score by column; write results.json, routing.json and samples/ (on rank 0).

    A second call on the same checkpoint and folder adds its tasks to those already there.

    Raises:
        CheckpointError: the folder holds no checkpoint of ours.
        ConfigError: an unknown task, or one that needs a judge while no API key is set.
        LibMoEError: lmms-eval gave no number for a task.
    """
    checkpoint = Path(checkpoint)
    identity = _identify(checkpoint)
    tasks = [_task_name(name) for name in config.tasks]
    _check_tasks(tasks)
    out = Path(config.out) if config.out else checkpoint.resolve().parent / "eval"
    manager = _find_tasks(tasks, config.include_path)
    partial = out / f".{ROUTING}.new"
    results = _run(checkpoint, tasks, manager, config, partial)
    if results is None:  # a rank other than 0
        return {}
    return _write(out, identity, results, partial)


def scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """lmms-eval's `results` as score by column: LibMoE's columns, and "task metric" for every other task.

    Raises:
        LibMoEError: a task came without the number that was asked for.
    """
    columns: dict[str, float] = {}
    known = {benchmark.task: (name, benchmark) for name, benchmark in BENCHMARKS.items()}
    for task, metrics in results.items():
        numbers = {key: value for key, value in metrics.items() if _is_score(key, value)}
        if task in known:
            name, benchmark = known[task]
            missing = [metric for metric in benchmark.metrics if metric not in numbers]
            if missing:
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


def _identify(checkpoint: Path) -> dict[str, Any]:
    """What tells one state of a checkpoint folder from another. Refuses what is no checkpoint, before slow imports."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"no checkpoint folder {checkpoint}: give one that libmoe-fast train wrote (RUN/final)")
    if not (checkpoint / "config.json").is_file():
        final = checkpoint / "final"
        hint = f"did you mean {final}?" if final.is_dir() else "give the final/ folder of a run"
        raise CheckpointError(f"{checkpoint} is not a checkpoint (it has no config.json): {hint}")
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{checkpoint} has no weights (*.safetensors): it is incomplete, save it again")
    status = [file.stat() for file in weights]
    return {
        "path": str(checkpoint.resolve()),
        "bytes": sum(s.st_size for s in status),
        "written": max(s.st_mtime_ns for s in status),
    }


def _task_name(name: str) -> str:
    columns = {column.lower(): benchmark.task for column, benchmark in BENCHMARKS.items()}
    return columns.get(name.lower(), name)


def _check_tasks(tasks: Sequence[str]) -> None:
    if not tasks:
        raise ConfigError(f"no task given: name lmms-eval tasks or some of {', '.join(BENCHMARKS)}")
    judged = {benchmark.task for benchmark in BENCHMARKS.values() if benchmark.judged}
    # Without a key these wait for the judge's server, then report a number all the same.
    key = "AZURE_API_KEY" if os.environ.get("API_TYPE") == "azure" else "OPENAI_API_KEY"
    for task in tasks:
        if task in judged and not os.environ.get(key):
            raise ConfigError(f"{task} is scored by a GPT judge and {key} is not set: set it, or leave the task out")


def _find_tasks(tasks: Sequence[str], include_path: Sequence[str]):
    """A TaskManager that knows all tasks; the 1,700 stock ones are only indexed when one of them is asked for."""
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"no folder {folder} to include tasks from")
    try:
        _quiet_lmms_eval()
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        known = [problem for problem in compatibility.problems() if "lmms-eval" in problem.problem]
        raise ConfigError(
            f"evaluation needs lmms-eval, which cannot be imported here ({error}): "
            + (" ".join(map(str, known)) or "pip install 'libmoe_fast[eval]'")
        ) from error

    paths = [str(Path(folder).resolve()) for folder in include_path]
    manager = TaskManager(include_path=paths, include_defaults=False, model_name="libmoe_fast")
    if any(task not in manager.task_index for task in tasks):
        manager = TaskManager(include_path=paths, model_name="libmoe_fast")
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "add its folder with --include_path"
        raise ConfigError(f"lmms-eval knows no task {unknown[0]!r}: {hint}")
    return manager


def _quiet_lmms_eval() -> None:
    """Leaves lmms-eval's warnings and errors on the terminal, not its news of every step."""
    import sys

    import datasets
    from loguru import logger
    from transformers.utils import logging

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _run(checkpoint: Path, tasks: list[str], manager, config: EvaluateConfig, record: Path) -> dict[str, Any] | None:
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    from libmoe_fast.lmms import LibMoEFast

    model = LibMoEFast(
        pretrained=str(checkpoint),
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
        backend=config.backend,
        image_aspect=None if config.image_aspect == "auto" else config.image_aspect,
        record=str(record),
        max_new_tokens=config.max_new_tokens,
    )
    try:
        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            batch_size=config.batch_size,
            limit=config.limit,
            bootstrap_iters=0,
            # accelerate would want a say in which device is whose; torchrun's environment is all the plugin needs
            distributed_executor_backend="torchrun",
        )
    except RetryError as error:  # lmms-eval tries what it downloads several times
        cause = error.last_attempt.exception()
        raise LibMoEError(
            f"lmms-eval gave up on {', '.join(tasks)} ({type(cause).__name__}: {str(cause).splitlines()[0]}): stock "
            "benchmarks come from the Hugging Face hub, which needs the network and a login (hf auth login)"
        ) from error


def _write(out: Path, identity: dict[str, Any], results: dict[str, Any], routing: Path) -> dict[str, float]:
    from libmoe_fast.analysis import RoutingCounts

    columns = scores(results["results"])
    counts = RoutingCounts.load(routing)
    content = {
        "format": FORMAT,
        "checkpoint": identity,
        "scores": columns,
        "questions": {task: n["effective"] for task, n in results["n-samples"].items()},
        "results": results["results"],
        "lmms_eval": results["lmms_eval_version"],
    }
    earlier = read_results(out)
    if earlier is not None and earlier["checkpoint"] == identity:
        for key in ("scores", "questions", "results"):
            content[key] = {**earlier[key], **content[key]}
        if (out / ROUTING).is_file():
            counts.tasks = {**RoutingCounts.load(out / ROUTING).tasks, **counts.tasks}
    for task, samples in results["samples"].items():
        lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
        write_atomically(out / "samples" / f"{task}.jsonl", "\n".join(lines) + "\n")
    counts.save(out / ROUTING)
    routing.unlink()
    write_atomically(out / RESULTS, json.dumps(content, indent=1, default=str))  # last: it says that all is there
    return columns
