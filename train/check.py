"""`libmoe-fast data check`: every record of LLaVA JSON files, and every image, before anything is paid for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

from libmoe_fast.errors import ConfigError, DataError
from libmoe_fast.train.images import load_image
from libmoe_fast.train.records import Records, name_record, read_records

SHOWN = 3  # examples of each kind of problem
AT_A_TIME = 64  # images per task of a process


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """How samples become tokens: as training does, with this tokenizer's folder and chat format."""

    tokenizer: str
    chat_template: str = "phi3"
    image_tokens: int = 576
    max_length: int = 2048


@dataclass(kw_only=True)
class Tokens:
    """Of whole samples. too_long: samples beyond max_length; without: those of them that have no answer before it."""

    image: int = 0
    text: int = 0
    answers: int = 0
    longest: int = 0
    too_long: int = 0
    without: int = 0

    def add(self, other: Tokens) -> None:
        for name in ("image", "text", "answers", "too_long", "without"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)

    def __str__(self) -> str:
        return (
            f"{self.image:,} tokens of images and {self.text:,} of text, {self.answers:,} of them in answers; "
            f"{self.image + self.text:,} in all"
        )


@dataclass(kw_only=True)
class DataReport:
    """What was found in one file.

    Args:
        records: what reading it gave.
        broken: one line for each image that cannot be used, with the records it belongs to.
        images: how many images were decoded; 0 if none were to be.
        tokens: of the good records, and the longest that max_length keeps; none if they were not to be counted.
    """

    file: Path
    records: Records
    broken: list[str] = field(default_factory=list)
    images: int = 0
    tokens: Tokens | None = None
    max_length: int = 0

    @property
    def problems(self) -> list[str]:
        return [*self.records.skipped, *self.broken]

    def __str__(self) -> str:
        number, pictured = len(self.records.good), sum(self.records.good.has_image)
        text = number - pictured
        questions = sum(len(record["conversations"]) // 2 for record in self.records.good)
        lines = [
            f"{self.file}: {self.records}",
            f"  {pictured:,} with an image, {text:,} of text alone; {questions / number:.1f} questions each",
        ]
        if self.images:
            lines.append(f"  {self.images:,} images decoded, {len(self.broken):,} broken")
        if self.tokens is not None:
            lines.append(f"  {self.tokens}")
            lines.append(
                f"  {self.tokens.text / number:.1f} of text per sample, the longest sample {self.tokens.longest:,}; "
                f"{self.tokens.too_long:,} are longer than {self.max_length:,} and cut, "
                f"{self.tokens.without:,} of those before any answer, and left out"
            )
        kinds = defaultdict(list)
        for problem in self.problems:
            kinds[_kind(problem)].append(problem)
        for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(found):,} x {kind}")
            lines += [f"      {line}" for line in found[:SHOWN]]
            lines += [f"      and {len(found) - SHOWN:,} more"] if len(found) > SHOWN else []
        lines.append(f"  --skip-bad-samples would leave out {len(self.problems):,}" if self.problems else "  all good")
        return "\n".join(lines)


def check_data(
    files: Sequence[str | Path],
    *,
    images: str | None = None,
    decode: bool = True,
    square: bool = True,
    workers: int = 2,
    tokens: TokenOptions | None = None,
) -> list[DataReport]:
    """Reads every record of the files and decodes every image, in several processes; one report per file.

    Args:
        images: folder that image paths start from; none given = each file's own.
        decode: whether images are decoded; else they only have to be there.
        tokens: count the tokens that training would make of the good records (LibMoE, table 1); none: do not.
        square: whether they will be padded to squares, which must stay within the limit on pixels, too.

    Raises:
        ConfigError: no file is given.
        DataError: a file cannot be read at all.
    """
    if not files:
        raise ConfigError("no file given; name one or more LLaVA JSON files")
    reports = []
    for name in files:
        file = Path(name)
        folder = file.parent if images is None else Path(images)
        report = DataReport(file=file, records=read_records(file, folder, skip_bad=True))
        if decode:
            _decode(report, folder, square, workers)
        if tokens is not None and len(report.records.good):
            _count(report, tokens, workers)
        reports.append(report)
    return reports


def _decode(report: DataReport, folder: Path, square: bool, workers: int) -> None:
    from tqdm import tqdm

    owners = defaultdict(list)
    for record in report.records.good:
        if "image" in record:
            owners[record["image"]].append(name_record(report.file, record["index"], record))
    report.images = len(owners)
    paths = [folder / image for image in owners]
    with ProcessPoolExecutor(max_workers=max(workers, 1)) as pool:
        found = pool.map(_image_problem, paths, repeat(square), chunksize=AT_A_TIME)
        for image, problem in zip(owners, tqdm(found, total=len(paths), desc="Decoding", leave=False), strict=True):
            if problem is not None:
                report.broken += [f"{name}: {problem}" for name in owners[image]]


def _image_problem(path: Path, square: bool) -> str | None:
    try:
        load_image(path, square=square)
    except DataError as error:
        return str(error)
    return None


def _count(report: DataReport, options: TokenOptions, workers: int) -> None:
    from tqdm import tqdm

    report.tokens, report.max_length = Tokens(), options.max_length
    records = report.records.good
    with ProcessPoolExecutor(max(workers, 1), initializer=_open_tokenizer, initargs=(options,)) as pool:
        found = pool.map(_tokens_of, records, chunksize=AT_A_TIME)
        for tokens in tqdm(found, total=len(records), desc="Counting tokens", leave=False):
            report.tokens.add(tokens)


_counting: tuple = ()  # of a process that counts: its options and tokenizer


def _open_tokenizer(options: TokenOptions) -> None:
    from libmoe_fast.train.model import load_tokenizer

    global _counting
    _counting = (options, load_tokenizer(Path(options.tokenizer)))


def _tokens_of(record: dict) -> Tokens:
    from libmoe_fast.train.chat import IGNORED, TEMPLATES, conversation_turns, encode

    options, tokenizer = _counting
    whole = {"image_tokens": options.image_tokens, "max_length": 2**62, "system": record.get("system")}
    ids, labels = encode(conversation_turns(record), tokenizer, TEMPLATES[options.chat_template], **whole)
    image = options.image_tokens if "image" in record else 0
    answers = [label != IGNORED for label in labels]
    return Tokens(
        image=image,
        text=len(ids) - image,
        answers=sum(answers),
        longest=len(ids),
        too_long=len(ids) > options.max_length,
        without=not any(answers[: options.max_length]),
    )


def _kind(problem: str) -> str:
    """A problem without what differs from record to record."""
    said = problem.split(": ", 2)[-1]
    said = re.sub(r"(image) '?/?[^ ']+'?", r"\1 FILE", said)
    return re.sub(r"\d[\d,]*", "N", said.split(": ")[0])
