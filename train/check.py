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


@dataclass(kw_only=True)
class DataReport:
    """What was found in one file.

    Args:
        records: what reading it gave.
        broken: one line for each image that cannot be used, with the records it belongs to.
        images: how many images were decoded; 0 if none were to be.
    """

    file: Path
    records: Records
    broken: list[str] = field(default_factory=list)
    images: int = 0

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
) -> list[DataReport]:
    """Reads every record of the files and decodes every image, in several processes; one report per file.

    Args:
        images: folder that image paths start from; none given = each file's own.
        decode: whether images are decoded; else they only have to be there.
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


def _kind(problem: str) -> str:
    """A problem without what differs from record to record."""
    said = problem.split(": ", 2)[-1]
    said = re.sub(r"(image) '?/?[^ ']+'?", r"\1 FILE", said)
    return re.sub(r"\d[\d,]*", "N", said.split(": ")[0])
