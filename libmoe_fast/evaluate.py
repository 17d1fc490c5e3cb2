"""Evaluating a checkpoint through lmms-eval: scores, answers and routing records in one folder.

    out/answers/TASK.RANK.jsonl   every answer, as it came (answers.py); what is there is not asked again
    out/results.json              scores by column, written after each task; failed tasks with their reasons
    out/routing.json              where image tokens went, by task and category (analysis.RoutingCounts)
    out/samples/TASK.jsonl        lmms-eval's samples: document, answer, metrics

Tasks are scored one after the other, by lmms-eval's own code in one process: one that fails takes nothing along. With
several processes each answers its share of a task's questions first.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from libmoe_fast import columns, compatibility
from libmoe_fast.analysis.results import (
    ANSWERS,
    DROPPED,
    FORMAT,
    RESULTS,
    ROUTING,
    evaluation_folder,
    read_results,
    run_folder,
)
from libmoe_fast.analysis.runs import settings_of
from libmoe_fast.columns import BENCHMARKS, SUITES
from libmoe_fast.errors import BackendError, CheckpointError, ConfigError, LibMoEError, in_one_line
from libmoe_fast.files import write_atomically

ANSWERS_FORMAT = 2  # of a line in answers/; a change makes older ones unread
LONGEST_WAIT = timedelta(days=7)  # for another process's share of a task
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is evaluated, and on what.

    Args:
        tasks: lmms-eval tasks, or columns of BENCHMARKS
        suite: "libmoe" adds the twelve benchmarks of LibMoE's paper
        skip_judged: leave out what a GPT judge scores
        accept_failed_judgements: report a judged score although some answers were not judged
        hub_folder: folder with local copies of the hub's data sets, laid out like it (lmms-lab-encoder/POPE/...)
        record_choices: keep which experts each image token was sent to, for the report on changes between checkpoints
            (7 kB per image for CLIP-L with 4 experts)
        record_outputs: compare what the chosen experts of an image token put out, which runs each of them once more
        drop_top1: take each token's first expert away and give its weight to the others, to see what it was worth; into
            eval-without-top1/ beside eval/
        out: folder for results.json, routing.json and the answers; default: eval/ beside the checkpoint
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
    suite: Literal["libmoe"] | None = None
    skip_judged: bool = False
    accept_failed_judgements: bool = False
    hub_folder: str | None = None
    record_choices: bool = False
    record_outputs: bool = False
    drop_top1: bool = False
    out: str | None = None
    include_path: list[str] = field(default_factory=list)
    batch_size: int = 16
    limit: int | None = None
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: str = "auto"
    backend: str | None = None
    image_aspect: Literal["auto", "pad", "none"] = "auto"
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Outcome:
    """What came of an evaluation: scores by column, and why tasks have none."""

    scores: dict[str, float]
    failures: dict[str, str]


def evaluate(checkpoint: str | os.PathLike, config: EvaluateConfig) -> Outcome:
    """Evaluates the tasks one after the other; returns their scores and failures (on rank 0, else an empty Outcome).

    What is on disk already is not computed again: an evaluation that was killed goes on, and a second one on the same
    checkpoint and folder adds its tasks to those already there.

    Raises:
        CheckpointError: the folder holds no checkpoint of ours.
        ConfigError: an unknown task, or one that needs a judge while no API key is set.
    """
    checkpoint = Path(checkpoint)
    identity = _identify(checkpoint) | ({DROPPED: True} if config.drop_top1 else {})
    tasks = _chosen_tasks(config)
    columns.check_judges(tasks)
    out = (Path(config.out) if config.out else evaluation_folder(checkpoint, drop_top1=config.drop_top1)).resolve()
    checkpoint = checkpoint.resolve()
    with _hub_folder(config.hub_folder):
        manager = _find_tasks(tasks, config.include_path)
        model = _model(checkpoint, identity, config, out)
        done, ranks = _Done(out, model.store.run, identity), _Ranks()
        for task in tasks:
            _evaluate_task(task, model, manager, config, done, ranks)
        model.close()
    if ranks.rank == 0 and model.loaded and not config.drop_top1:
        from libmoe_fast.analysis.weights import weight_distances

        done.weigh(weight_distances(model.module, _dense_start(checkpoint)))
    if ranks.rank > 0:
        return Outcome({}, {})
    asked = {columns.BY_TASK[task][0] if task in columns.BY_TASK else task for task in tasks}
    scores = {c: s for c, s in done.content["scores"].items() if c in asked or c.split(" ")[0] in tasks}
    return Outcome(scores, {task: reason for task, reason in done.content["failures"].items() if task in tasks})


def _chosen_tasks(config: EvaluateConfig) -> list[str]:
    names = [*(SUITES[config.suite] if config.suite else ()), *config.tasks]
    tasks = list(dict.fromkeys(columns.task_name(name) for name in names))
    if config.skip_judged:
        tasks = [task for task in tasks if task not in columns.BY_TASK or not columns.BY_TASK[task][1].judge]
    if not tasks:
        raise ConfigError(
            f"no task given: name lmms-eval tasks or some of {', '.join(BENCHMARKS)}, or --suite {' or '.join(SUITES)}"
        )
    return tasks


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


def _dense_start(checkpoint: Path) -> Path | None:
    """The checkpoint that training upcycled, where the run says so and it is still there."""
    model = (settings_of(run_folder(checkpoint)) or {}).get("model")
    path = model.get("path") if isinstance(model, dict) else None
    return Path(path) if isinstance(path, str) and Path(path).is_dir() else None


# ---------------------------------------------------------------------------------------------------------------------
# lmms-eval


@contextlib.contextmanager
def _hub_folder(folder: str | None) -> Iterator[None]:
    """Inside, data sets are found in a folder by their names on the hub: it is the working directory, asked first.

    Some tasks load further data sets by name in their own code, so replacing the names in their settings would not do.
    """
    if folder is None:
        yield
        return
    if not Path(folder).is_dir():
        raise ConfigError(f"no folder {folder} to take data sets from")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _own_cache(task: str, config: EvaluateConfig) -> Iterator[str]:
    """Inside, datasets caches what it makes of a local copy where another copy, or this one changed, has another place.

    Yields what tells the copies apart. By itself datasets goes by the names in README.md, and takes the old data.
    """
    if config.hub_folder is None:
        yield ""
        return
    import datasets
    from lmms_eval.api import task as task_module

    repository = columns.BY_TASK[task][1].repository if task in columns.BY_TASK else ""
    place = Path.cwd() / repository  # the working directory is the hub folder
    files = sorted(path for path in place.rglob("*") if path.is_file())
    seen = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    before = datasets.config.HF_DATASETS_CACHE
    cache = Path(before) / f"libmoe_fast-{digest}"
    datasets.config.HF_DATASETS_CACHE = cache
    task_module._resolve_hf_datasets_cache_dir.cache_clear()  # it remembers the first task's
    with _environment({"LMMS_EVAL_DATASETS_CACHE": str(cache)}):
        try:
            yield digest
        finally:
            datasets.config.HF_DATASETS_CACHE = before
            task_module._resolve_hf_datasets_cache_dir.cache_clear()


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _find_tasks(tasks: Sequence[str], include_path: Sequence[str]):
    """A TaskManager that knows all tasks; the 1,700 stock ones are only indexed when one of them is asked for."""
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"no folder {folder} to include tasks from")
    try:
        _quiet_lmms_eval()
        import lmms_eval.tasks  # noqa: F401
    except ImportError as error:
        known = [problem for problem in compatibility.problems() if "lmms-eval" in problem.problem]
        raise ConfigError(
            f"evaluation needs lmms-eval, which cannot be imported here ({error}): "
            + (" ".join(map(str, known)) or "pip install 'libmoe_fast[eval]'")
        ) from error

    paths = tuple(str(Path(folder).resolve()) for folder in include_path)
    written = tuple(file.stat().st_mtime_ns for path in paths for file in sorted(Path(path).rglob("*.yaml")))
    manager = _task_manager(paths, written, stock=False)
    if any(task not in manager.task_index for task in tasks):
        manager = _task_manager(paths, written, stock=True)
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "add its folder with --include_path"
        raise ConfigError(f"lmms-eval knows no task {unknown[0]!r}: {hint}")
    return manager


@functools.cache
def _task_manager(paths: tuple[str, ...], written: tuple[int, ...], *, stock: bool):
    """Indexing the stock tasks takes seconds, which several checkpoints need not pay again.

    written: when the files in `paths` were, so that edited ones are read anew.
    """
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths), include_defaults=stock, model_name="libmoe_fast")


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


def _model(checkpoint: Path, identity: dict[str, Any], config: EvaluateConfig, out: Path):
    from libmoe_fast.answers import AnswerStore
    from libmoe_fast.lmms import LibMoEFast

    settings = {"dtype": config.dtype, "image_aspect": config.image_aspect, "max_new_tokens": config.max_new_tokens}
    run = {"format": ANSWERS_FORMAT, "checkpoint": identity, **settings}
    store = AnswerStore(out / ANSWERS, run, rank=int(os.environ.get("RANK", 0)))
    model = LibMoEFast(
        pretrained=str(checkpoint),
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
        backend=config.backend,
        image_aspect=None if config.image_aspect == "auto" else config.image_aspect,
        max_new_tokens=config.max_new_tokens,
        answers=store,
        choices=config.record_choices,
        outputs=config.record_outputs,
        drop_top1=config.drop_top1,
    )
    if store.empty:  # this checkpoint has answered nothing yet: that it cannot be loaded is better known now
        model.load()
    return model


class _Ranks:
    """The processes that evaluate together. No process group: lmms-eval would join in, and wait where others do not."""

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._meetings = 0
        if self.world > 1:
            from torch.distributed import rendezvous

            self._store, *_ = next(iter(rendezvous("env://")))

    def meet(self) -> None:
        """Returns when all processes have called it."""
        self._meetings += 1
        if self.world > 1:
            name = f"libmoe_fast/evaluate/{self._meetings}"
            if self._store.add(name, 1) == self.world:
                self._store.set(f"{name}/all", "")
            self._store.wait([f"{name}/all"], LONGEST_WAIT)


def _evaluate_task(task: str, model, manager, config: EvaluateConfig, done: _Done, ranks: _Ranks) -> None:
    """One task, answered by all processes and scored by the first. Whatever goes wrong in it is its failure alone."""
    from libmoe_fast.lmms import AnsweredShare

    failure = None
    if ranks.world > 1:
        try:
            _run_alone(task, model, manager, config, done.out, share=(ranks.rank, ranks.world))
        except AnsweredShare:
            pass
        except Exception as error:  # a task is other people's code on other people's data
            failure = error
        ranks.meet()
        model.store.reload()
    if ranks.rank > 0:
        return
    try:
        if failure is not None:
            raise failure
        with _logged() as lines:
            results = _run_alone(task, model, manager, config, done.out, share=None)
        failed = columns.failed_judgements(task, results["samples"].get(task, []), lines)
        if failed:  # what was kept of them says nothing of it
            shutil.rmtree(_Arguments(done.out, task, model).output_path, ignore_errors=True)
        done.add(task, results, model.counts, _unjudged(task, failed, results, config))
    except (CheckpointError, BackendError):  # the model itself: no other task would fare better
        raise
    except Exception as error:
        done.fail(task, _reason(task, error))


def _run_alone(
    task: str, model, manager, config: EvaluateConfig, out: Path, *, share: tuple[int, int] | None
) -> dict[str, Any]:
    """lmms-eval on one task, as if this were the only process: its collectives would wait for one that has failed."""
    from lmms_eval.evaluator import simple_evaluate

    with _own_cache(task, config) as data, _environment(ONE_PROCESS):
        model.begin(share, data)
        return simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=manager,
            batch_size=config.batch_size,
            limit=config.limit,
            bootstrap_iters=0,
            # accelerate would want a say in which device is whose
            distributed_executor_backend="torchrun",
            cli_args=_Arguments(out, task, model),
        )


class _Arguments(SimpleNamespace):
    """What tasks read of lmms-eval's command line: where they may write, for one a judge's words.

    The place depends on the answers: not paid for twice, nor taken for judgements of other answers.
    """

    def __init__(self, out: Path, task: str, model) -> None:
        super().__init__(process_with_media=True)
        self._place = lambda: out / "judged" / f"{task}-{model.digest()}"

    @property
    def output_path(self) -> str:
        return str(self._place())


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """What lmms-eval logs inside: its scorers say there, and only there, that a judge did not answer."""
    from loguru import logger

    lines: list[str] = []
    remove = logger.remove

    def listen() -> None:
        logger.add(lambda message: lines.append(str(message)), level="INFO")

    def remove_others(handler: int | None = None) -> None:
        """Tasks and models of lmms-eval take all handlers away when they are imported."""
        remove(handler)
        if handler is None:
            listen()

    listen()
    logger.remove = remove_others
    try:
        yield lines
    finally:
        del logger.remove
        _quiet_lmms_eval()


def _unjudged(task: str, failed: int, results: dict[str, Any], config: EvaluateConfig) -> str | None:
    """Why the task's score is none; None if it is one, or is taken all the same."""
    if not failed:
        return None
    reason = f"{failed} of {len(results['samples'][task])} answers were not judged"
    if config.accept_failed_judgements:
        warnings.warn(f"{task}: {reason}; the score counts them as wrong, or by chance", stacklevel=2)
        return None
    return f"{reason}: check the judge's key and address and run again (--accept_failed_judgements takes the score)"


def _reason(task: str, error: Exception) -> str:
    if type(error).__name__ == "RetryError":  # lmms-eval tries what it downloads several times
        cause = error.last_attempt.exception()
        words = f"lmms-eval gave up on {task} ({type(cause).__name__}: {in_one_line(cause)})"
        if not isinstance(cause, OSError):
            return words
        return (
            f"{words}: stock benchmarks come from the Hugging Face hub, which needs the network and a login "
            "(hf auth login), or from --hub_folder"
        )
    return in_one_line(error) if isinstance(error, LibMoEError) else f"{type(error).__name__}: {in_one_line(error)}"


# ---------------------------------------------------------------------------------------------------------------------
# What is on disk


class _Done:
    """results.json, routing.json and samples/ of an evaluation folder; each task is written as it ends."""

    def __init__(self, out: Path, answers: str, identity: dict[str, Any]) -> None:
        from libmoe_fast.analysis import RoutingCounts

        self.out = out
        self.content: dict[str, Any] = {"format": FORMAT, "checkpoint": identity, "answers": answers}
        self.counts: RoutingCounts | None = None
        earlier = read_results(out)
        same = earlier is not None and earlier["checkpoint"] == identity
        for key in ("scores", "questions", "results", "failures", "weights"):
            self.content[key] = dict(earlier.get(key, {})) if same else {}
        if same and (out / ROUTING).is_file():
            self.counts = RoutingCounts.load(out / ROUTING)

    def add(self, task: str, results: dict[str, Any], counts, unjudged: str | None) -> None:
        for name, samples in results["samples"].items():
            lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
            write_atomically(self.out / "samples" / f"{name}.jsonl", "\n".join(lines) + "\n")
        if self.counts is None or self.counts.layers != counts.layers:
            self.counts = counts
        else:
            self.counts.tasks.update(counts.tasks)
        self.counts.save(self.out / ROUTING)
        self.content["results"] |= results["results"]
        self.content["questions"] |= {name: n["effective"] for name, n in results["n-samples"].items()}
        self.content["lmms_eval"] = compatibility.installed_version("lmms_eval")
        if unjudged is not None:
            raise LibMoEError(unjudged)
        self.content["scores"] |= columns.scores(results["results"])
        self.content["failures"].pop(task, None)
        self._write()

    def weigh(self, distances: dict[str, dict[str, Any]]) -> None:
        """How far the experts have moved, beside what they score."""
        self.content["weights"] = distances
        self._write()

    def fail(self, task: str, reason: str) -> None:
        """The task has no score now; one from before stays beside the reason."""
        self.content["failures"][task] = reason
        self._write()

    def _write(self) -> None:
        write_atomically(self.out / RESULTS, json.dumps(self.content, indent=1, default=str))
