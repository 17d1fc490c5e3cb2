"""The command line: `libmoe-fast train | plan | data | evaluate | report | convert | bench | doctor`."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from libmoe_fast.errors import ConfigError, LibMoEError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}

_DESCRIPTION = """\
Train, evaluate and compare Mixture-of-Experts vision-language models.

  libmoe-fast train --config clip_phi3_stage3 --model.path runs/stage2/final --model.router cosine \\
                    --data.file llava_665k.json --data.images images --run.folder runs/cosine
  libmoe-fast plan --config clip_phi3_stage3 --gpus 4 --gpu a100-80g
  libmoe-fast data check llava_665k.json --images images
  libmoe-fast evaluate runs/cosine/final --tasks MME POPE
  libmoe-fast report runs
  libmoe-fast convert published/libmoe-clip-phi3 runs/theirs --version v1.1 --vision_tower models/clip
  libmoe-fast bench
  libmoe-fast doctor

Each command has its own --help. A mistake is one line on stderr and exit code 2; nothing already written is lost.
"""

_TRAIN = """\
Train one stage of the pipeline: 1 the projector, 2 everything (dense), 3 upcycle to experts and train everything.

The same command on the same --run.folder goes on from its last checkpoint.

  libmoe-fast train --config clip_phi3_stage1 --data.file blip_558k.json --run.folder runs/stage1
  libmoe-fast train --config clip_phi3_stage3 --config mine.yaml --model.router sigmoid --optim.lr 4e-6
  deepspeed --num_gpus 4 --module libmoe_fast.train --config clip_phi3_stage3 ...

Several --config files are merged in the order given; options after them win. Presets: {presets}.
"""

_PLAN = """\
Say what a stage will cost, before it runs: parameters, operations, memory of each GPU by part, disk, hours.

  libmoe-fast plan --config clip_phi3_stage3 --gpus 4 --gpu a100-80g
  libmoe-fast plan --config siglip_phi35_stage2 --gpus 8 --gpu h100 --engine.offload false
  libmoe-fast plan --config mine.yaml --vision models/clip --language models/phi3 --samples 120000 --text_tokens 300

Takes the options of `libmoe-fast train`. The model is built at true size without weights, and one batch is run on
shapes alone: it takes seconds, and neither a GPU nor a checkpoint.
"""

_DATA = """\
Check training data: every record is read as training reads it, and every image decoded, in several processes.

  libmoe-fast data check llava_665k.json --images images
  libmoe-fast data check blip_558k.json allava.json --no-decode
  libmoe-fast data check llava_665k.json --no-decode --tokenizer models/Phi-3-mini-4k-instruct

Problems are counted by kind, with examples: exit code 1 if there are any.
"""

_EVALUATE = """\
Evaluate a checkpoint through lmms-eval; count which experts its images are sent to.

  libmoe-fast evaluate runs/smoe/final --tasks MME POPE --batch_size 16
  libmoe-fast evaluate runs/*/final --suite libmoe --skip_judged --hub_folder datasets
  libmoe-fast evaluate runs/smoe/final --tasks my_task --include_path my_tasks/
  torchrun --nproc_per_node 4 -m libmoe_fast.cli evaluate runs/smoe/final --tasks mmstar

Answers are written as they come and scores after each task, to eval/ beside the checkpoint, where `libmoe-fast report`
finds them. The same command goes on where it stopped. A task that fails is reported at the end (exit code 1); the
others keep their scores.
"""

_REPORT = """\
Compare all runs in a folder: scores as in LibMoE's table 2, how experts are used, and its figures 3 and 5 to 9.

  libmoe-fast report runs

Writes report.html (all in one file), report.md with its figures, report.csv, report.tex and report.json into the
folder, and prints the table.
"""

_CONVERT = """\
Convert a published checkpoint: LibMoE's experts, or a dense LLaVA, CuMo or LibMoE, to what evaluate and train take.

  libmoe-fast convert published/smoe runs/theirs --version v1.1 --vision_tower models/clip-vit-large-patch14-336
  libmoe-fast convert published/pft runs/dense --vision_tower models/siglip-so400m-patch14-224
  libmoe-fast convert runs/cosine/final exported --to libmoe --version v1.1

Every tensor is accounted for; what does not fit is an error that names it, and nothing is written.
"""

_BENCH = """\
Measure our layers on this machine, against their limits and against other ways to run the same experts.

  libmoe-fast bench                                   # quick: under 2 minutes on 2 CPU cores
  libmoe-fast bench --preset full --out runs/bench_h100
  libmoe-fast bench --compare runs/old/results.json runs/new/results.json

Writes results.json, results.md and plots into --out, and prints the table at a glance. Peers that are not installed are
listed with how to get them. --compare flags what became slower, or holds more memory, beyond the noise: exit code 1.
"""

_DOCTOR = """\
Say what works here: versions, the extension and its ABI, and for each backend that cannot run, why and what to do.

  libmoe-fast doctor
  libmoe-fast doctor --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 where a part failed, 2 after an error the user can act on, 130
    after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except LibMoEError as error:
        print(f"libmoe-fast: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"libmoe-fast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `libmoe-fast report runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"libmoe-fast: error: cannot write {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    try:
        import jsonargparse
    except ImportError as error:
        raise ConfigError(f"the command line needs {error.name}: pip install 'libmoe_fast[all]'") from error

    commands: dict[str, tuple[str, Callable, Callable]] = {
        "train": (_TRAIN.format(presets=", ".join(_preset_names()) or "none"), _add_train, _train),
        "plan": (_PLAN, _add_plan, _plan),
        "data": (_DATA, _add_data, _data),
        "evaluate": (_EVALUATE, _add_evaluate, _evaluate),
        "report": (_REPORT, _add_report, _report),
        "convert": (_CONVERT, _add_convert, _convert),
        "bench": (_BENCH, _add_bench, _bench),
        "doctor": (_DOCTOR, _add_doctor, _doctor),
    }
    parser = _parser(jsonargparse, "libmoe-fast", _DESCRIPTION)
    subcommands = parser.add_subcommands(metavar="COMMAND", help="what to do")
    for name, (description, add_arguments, _) in commands.items():
        command = _parser(jsonargparse, f"libmoe-fast {name}", description)
        add_arguments(command)
        subcommands.add_subcommand(name, command, help=description.splitlines()[0])
    if not arguments:
        parser.print_help()
        return 2
    try:
        options = parser.parse_args(_with_preset_paths(arguments))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(f"{error} (see libmoe-fast --help)") from error
    return commands[options.subcommand][2](options[options.subcommand])


def _parser(jsonargparse, program: str, description: str) -> ArgumentParser:
    import argparse

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        """Keeps the examples' line breaks."""

    return jsonargparse.ArgumentParser(
        prog=program, description=description, formatter_class=Formatter, exit_on_error=False
    )


def _add_train(parser: ArgumentParser) -> None:
    from libmoe_fast.train.config import add_train_arguments

    add_train_arguments(parser)


def _train(options: Namespace) -> int:
    from libmoe_fast.train.config import check, config_from_namespace

    config = config_from_namespace(options)
    check(config)  # before the slow imports
    from libmoe_fast.train.loop import train

    train(config)
    return 0


def _add_plan(parser: ArgumentParser) -> None:
    from typing import Literal

    from libmoe_fast.train.config import add_train_arguments
    from libmoe_fast.train.plan import GPUS, LANGUAGE, VISION

    add_train_arguments(parser)
    parser.add_argument("--gpus", type=int, default=4, help="how many GPUs")
    parser.add_argument("--gpu", type=Literal[tuple(GPUS)], default="a100-80g", help="which")
    models = "or a folder with its config.json; default: what the preset is for"
    parser.add_argument("--vision", type=str | None, default=None, help=f"{', '.join(VISION)}, {models}")
    parser.add_argument("--language", type=str | None, default=None, help=f"{', '.join(LANGUAGE)}, {models}")
    parser.add_argument("--samples", type=int | None, default=None, help="of the data; default: as in LibMoE's table 1")
    parser.add_argument("--text_tokens", type=float | None, default=None, help="of a sample; default: as there")
    parser.add_argument("--images", type=float | None, default=None, help="of a sample; default: as there")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the GPUs' peak that is reached")
    parser.add_argument("--host_bandwidth", type=float, default=100.0, help="GB/s of a host's memory, for offload")
    parser.add_argument("--link_bandwidth", type=float, default=20.0, help="GB/s between it and a GPU, each way")


def _plan(options: Namespace) -> int:
    from libmoe_fast.train.config import config_from_namespace
    from libmoe_fast.train.plan import models_of, plan, setting_of

    config = config_from_namespace(options)
    setting = setting_of([Path(str(path)).stem for path in options.config or []])
    vision, language = models_of(config, setting)
    print(
        plan(
            config,
            gpus=options.gpus,
            gpu=options.gpu,
            vision=options.vision or vision,
            language=options.language or language,
            setting=setting,
            samples=options.samples,
            text_tokens=options.text_tokens,
            images=options.images,
            utilisation=options.utilisation,
            host_bandwidth=options.host_bandwidth,
            link_bandwidth=options.link_bandwidth,
        )
    )
    return 0


def _add_data(parser: ArgumentParser) -> None:
    from typing import Literal

    parser.add_argument("action", type=Literal["check"], help="check: read all of it, and say what is wrong")
    parser.add_argument("files", nargs="+", help="LLaVA JSON files")
    parser.add_argument("--images", type=str | None, default=None, help="folder that image paths start from")
    parser.add_argument("--no-decode", action="store_true", help="images only have to be there")
    parser.add_argument("--image_aspect", type=Literal["pad", "none"], default="pad", help="as training will have it")
    parser.add_argument("--workers", type=int | None, default=None, help="processes; default: one per core")
    parser.add_argument(
        "--tokenizer", type=str | None, default=None, help="folder of a language model: also count tokens with it"
    )
    parser.add_argument("--chat_template", type=Literal["phi3", "phi3.5"], default="phi3", help="for --tokenizer")
    parser.add_argument("--image_tokens", type=int, default=576, help="for --tokenizer: 576 of CLIP-L, 256 of SigLIP")
    parser.add_argument("--max_length", type=int, default=2048, help="for --tokenizer: as training will have it")
    parser.add_argument("--list", type=str | None, default=None, help="also write every problem into this file")


def _data(options: Namespace) -> int:
    from libmoe_fast.files import write_atomically
    from libmoe_fast.train.check import TokenOptions, check_data

    tokens = None
    if options.tokenizer is not None:
        names = ("tokenizer", "chat_template", "image_tokens", "max_length")
        tokens = TokenOptions(**{name: options[name] for name in names})
    reports = check_data(
        options.files,
        images=options.images,
        decode=not options.no_decode,
        square=options.image_aspect == "pad",
        workers=options.workers or os.cpu_count() or 1,
        tokens=tokens,
    )
    print("\n".join(map(str, reports)))
    problems = [problem for report in reports for problem in report.problems]
    if options.list is not None:
        write_atomically(options.list, "".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


def _add_evaluate(parser: ArgumentParser) -> None:
    from libmoe_fast.evaluate import BENCHMARKS, EvaluateConfig

    parser.add_argument(
        "checkpoints",
        nargs="+",
        help="final/ folders of runs, or any folders save_model wrote; a run with exports/: all of its checkpoints",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], help=f"lmms-eval tasks, or LibMoE's benchmarks: {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--include_path", nargs="+", default=[], help="folders with further lmms-eval task files")
    switches = {field.name for field in dataclasses.fields(EvaluateConfig) if field.default is False}
    parser.add_class_arguments(EvaluateConfig, skip={"tasks", "include_path", *switches})
    _add_switches(parser, EvaluateConfig, switches)


def _add_switches(parser: ArgumentParser, cls: type, names: set[str]) -> None:
    """Options that are on where they are named: jsonargparse's own would want to be told "true"."""
    from docstring_parser import parse

    said = {param.arg_name: " ".join(param.description.split()) for param in parse(cls.__doc__).params}
    for field in dataclasses.fields(cls):
        if field.name in names:
            parser.add_argument(f"--{field.name}", action="store_true", help=said[field.name])


def _evaluate(options: Namespace) -> int:
    from libmoe_fast.analysis.results import checkpoints_of
    from libmoe_fast.evaluate import EvaluateConfig, evaluate

    values = vars(options)
    checkpoints = [path for given in values.pop("checkpoints") for path in checkpoints_of(given)]
    if len(checkpoints) > 1 and values["out"] is not None:
        raise ConfigError(f"--out is one folder, and there are {len(checkpoints)} checkpoints; leave it out")
    failed = False
    for checkpoint in checkpoints:
        outcome = evaluate(checkpoint, EvaluateConfig(**values))
        if len(checkpoints) > 1:
            print(f"{checkpoint}:")
        for column, score in outcome.scores.items():
            print(f"{column}: {score:.2f}")
        for task, reason in outcome.failures.items():
            print(f"libmoe-fast: {checkpoint}: {task} failed: {_one_line(reason)}", file=sys.stderr)
        failed = failed or bool(outcome.failures)
    return 1 if failed else 0


def _add_report(parser: ArgumentParser) -> None:
    parser.add_argument("folder", help="folder that holds runs of train and evaluate, or one run")
    parser.add_argument("--out", type=str | None, default=None, help="folder for the report; default: the same")


def _report(options: Namespace) -> int:
    from libmoe_fast.analysis.report import make_report

    print(make_report(options.folder, out=options.out))
    print(f"\nwritten: {Path(options.out or options.folder) / 'report.html'}")
    return 0


def _add_convert(parser: ArgumentParser) -> None:
    from typing import Literal

    parser.add_argument("source", help="folder of the checkpoint; it is only read")
    parser.add_argument("out", help="folder for what it becomes")
    parser.add_argument(
        "--to",
        type=Literal["libmoe_fast", "libmoe"],
        default="libmoe_fast",
        help="libmoe: from ours to LibMoE's names, one tensor per expert",
    )
    parser.add_argument(
        "--vision_tower", type=str | None, default=None, help="folder of the CLIP or SigLIP that it was trained with"
    )
    parser.add_argument(
        "--version",
        type=Literal["v1.1", "v2"] | None,
        default=None,
        help="of LibMoE, where there are experts: CLIP towers and sigmoid gates differ, and no file says which it is",
    )
    parser.add_argument(
        "--chat_template",
        type=Literal["phi3", "phi3.5"] | None,
        default=None,
        help="the language model's chat format; none given = by its context length",
    )


def _convert(options: Namespace) -> int:
    from libmoe_fast.convert import convert

    values = vars(options)
    print(convert(values.pop("source"), values.pop("out"), **values))
    return 0


def _add_bench(parser: ArgumentParser) -> None:
    presets = "quick, full, paper (the layers that LibMoE trains), or cpu (those of benchmarks/cpu_ratio.py)"
    parser.add_argument("--preset", default="quick", help=presets)
    parser.add_argument("--out", default="runs/bench", help="folder for the report")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; default: a GPU if there is one")
    parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="compare two results.json instead")
    parser.add_argument("--tolerance", type=float, default=0.1, help="with --compare: a smaller change is no change")


def _bench(options: Namespace) -> int:
    if options.compare:
        from libmoe_fast.benchmarks.compare import compare_files

        comparison = compare_files(*options.compare, tolerance=options.tolerance)
        print(comparison.markdown())
        return 1 if comparison.regressions else 0
    from libmoe_fast.benchmarks.report import summary
    from libmoe_fast.benchmarks.run import run_preset

    out = Path(options.out)
    results = run_preset(options.preset, out, device=options.device, threads=options.threads)
    print(summary(results))
    print(f"\nwritten: {out / 'results.md'}")
    return 0


def _add_doctor(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _doctor(options: Namespace) -> int:
    from libmoe_fast import doctor

    return doctor.run(json=options.json)


def _preset_folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("libmoe_fast.train")
    return Path(spec.submodule_search_locations[0]) / "presets"


def _preset_names() -> list[str]:
    return sorted(path.stem for path in _preset_folder().glob("*.yaml"))


def _with_preset_paths(arguments: list[str]) -> list[str]:
    """`--config clip_phi3_stage3` means the packaged preset, unless there is a file of that name.

    Raises:
        ConfigError: a config file cannot be used; the parser's own message would not say which.
    """
    resolved = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        prefix = "--config=" if argument.startswith("--config=") else ""
        if prefix or before == "--config":
            argument = prefix + _config_file(argument.removeprefix(prefix))
        resolved.append(argument)
    return resolved


def _config_file(name: str) -> str:
    from libmoe_fast.config_files import check_config_file

    preset = _preset_folder() / f"{name}.yaml"
    path = preset if preset.is_file() and not Path(name).exists() else Path(name)
    if path.exists():
        check_config_file(path)
    return str(path)


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
