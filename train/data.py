"""Samples and batches: images and conversations to the tensors a Hugging Face LLaVA takes."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from libmoe_fast.checkpoint import DEFAULT_FORMAT
from libmoe_fast.errors import DataError, in_one_line
from libmoe_fast.train.chat import IGNORED, IMAGE, TEMPLATES, NoAnswerError, conversation_turns, encode
from libmoe_fast.train.config import DataConfig
from libmoe_fast.train.images import prepare_image
from libmoe_fast.train.records import Record, Records, name_record, read_records
from libmoe_fast.train.sampler import ModalityLengthSampler
from libmoe_fast.train.table import RecordTable

LONGEST_STEP_LEFT = 30.0  # seconds that processes that load images live on after a SIGTERM; torchrun waits as long


@dataclass(kw_only=True)
class Sample:
    """One conversation in tokens.

    Args:
        ids: token ids.
        labels: as many labels, IGNORED outside answers.
        pixels: [3, height, width], or None for text only.
        skipped: a line for each bad sample that this one stands in for.
    """

    ids: list[int]
    labels: list[int]
    pixels: Tensor | None
    skipped: list[str] = field(default_factory=list)


class ConversationDataset(Dataset[Sample]):
    """LLaVA JSON records as samples.

    Args:
        processor: the model's LlavaProcessor.
        image_tokens: tokens that one image takes.
        template: name of a chat format in chat.TEMPLATES.
        records: what read_records has read of the file; none given = it is read now.

    Raises:
        DataError: on opening, for everything that can be seen without loading images; on access, for the rest.
    """

    def __init__(
        self, config: DataConfig, processor: Any, *, image_tokens: int, template: str, records: Records | None = None
    ) -> None:
        self.config, self.processor = config, processor
        self.image_tokens, self.template = image_tokens, TEMPLATES[template]
        self.file, self.images = paths(config)
        records = records or open_records(config)
        self.skipped = records.skipped
        self.records = _share(records.good, config.fraction, config.fraction_seed)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def has_image(self) -> list[bool]:
        return self.records.has_image

    @property
    def lengths(self) -> list[int]:
        """Characters per conversation: enough to sort by, without tokenising the whole data set first."""
        return self.records.lengths

    def __getitem__(self, index: int) -> Sample:
        skipped: list[str] = []
        for record in self._candidates(index):
            try:
                sample = self._load(record)
            except DataError as error:
                line = f"{name_record(self.file, record['index'], record)}: {error}"
                # One that is too long is not bad: it is left out, and counted, whatever was asked for.
                if not self.config.skip_bad_samples and not isinstance(error, NoAnswerError):
                    raise DataError(f"{line} (--skip-bad-samples leaves it out)") from error
                skipped.append(line)
            else:
                sample.skipped = skipped
                return sample
        raise DataError(f"{self.file}: no sample of the kind of {skipped[0]} can be used")

    def _candidates(self, index: int) -> Iterator[Record]:
        """The record, then those that may stand in for it: batches keep their size and their modality."""
        record = self.records[index]
        yield record
        following = (self.records[(index + ahead) % len(self)] for ahead in range(1, len(self)))
        yield from (other for other in following if ("image" in other) == ("image" in record))

    def _load(self, record: Record) -> Sample:
        ids, labels = encode(
            conversation_turns(record),
            self.processor.tokenizer,
            self.template,
            image_tokens=self.image_tokens,
            max_length=self.config.max_length,
            system=record.get("system"),
        )
        pixels = self._pixels(self.images / record["image"]) if "image" in record else None
        return Sample(ids=ids, labels=labels, pixels=pixels)

    def _pixels(self, path: Path) -> Tensor:
        aspect = self.config.image_aspect or DEFAULT_FORMAT["image_aspect"]
        image = prepare_image(path, self.processor.image_processor, aspect)
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def paths(config: DataConfig) -> tuple[Path, Path]:
    """The file of records, and the folder that their images' paths start from."""
    file = Path(config.file)
    return file, Path(config.images) if config.images is not None else file.parent


def open_records(config: DataConfig, *, table: Path | None = None) -> Records:
    """What config names, read and checked; raises as read_records does."""
    return read_records(*paths(config), skip_bad=config.skip_bad_samples, table=table)


def _share(records: RecordTable, fraction: float, seed: int) -> RecordTable:
    """This share of the records (at least one), in their order."""
    if fraction == 1:
        return records
    kept = max(round(len(records) * fraction), 1)
    drawn = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:kept]
    return records.share(sorted(drawn.tolist()))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch.

    Args:
        inputs: what the model takes: input_ids, attention_mask, labels [B, L] int64, pixel_values [images, 3, h, w].
        text_only: the one image among the inputs is a dummy.
        labels, tokens: how many there are.
        skipped: a line for each bad sample that was replaced.
    """

    inputs: dict[str, Tensor]
    text_only: bool
    labels: int
    tokens: int
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Samples to a batch, padded on the right.

    A batch without an image gets one more row: a blank image and no labels. It adds zero to loss and gradients, and
    takes every rank through the vision tower, without which ZeRO-3 and DDP would wait forever for the ranks that have
    images, and the tower's gradients would be missing instead of zero.
    """

    pad_id: int
    image_id: int
    image_tokens: int
    pixels_shape: tuple[int, int, int]

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        rows = [(sample.ids, sample.labels) for sample in samples]
        if not pixels:
            pixels = [torch.zeros(self.pixels_shape)]
            rows.append(([self.image_id] * self.image_tokens, [IGNORED] * self.image_tokens))
        length = max(len(ids) for ids, _ in rows)
        inputs = {
            "input_ids": _pad([ids for ids, _ in rows], length, self.pad_id),
            "attention_mask": _pad([[1] * len(ids) for ids, _ in rows], length, 0),
            "labels": _pad([labels for _, labels in rows], length, IGNORED),
            "pixel_values": torch.stack(pixels),
        }
        return Batch(
            inputs=inputs,
            text_only=all(sample.pixels is None for sample in samples),
            labels=sum(label != IGNORED for sample in samples for label in sample.labels),
            tokens=sum(len(sample.ids) for sample in samples),
            skipped=[line for sample in samples for line in sample.skipped],
        )


def _pad(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def make_collator(processor: Any, image_tokens: int) -> Collator:
    blank = processor.image_processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"][0]
    tokenizer = processor.tokenizer
    return Collator(
        pad_id=tokenizer.pad_token_id,
        image_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_tokens=image_tokens,
        pixels_shape=tuple(blank.shape),
    )


def batches(dataset: ConversationDataset, sampler: ModalityLengthSampler, collator: Collator) -> Iterator[Batch]:
    """The sampler's micro-batches, loaded by the data set's worker processes.

    Raises:
        DataError: a sample cannot be used, or a worker process died.
    """
    loader = DataLoader(
        _ErrorsAsValues(dataset),
        batch_sampler=sampler,
        collate_fn=lambda outcomes: _first_error(outcomes) or collator(outcomes),
        num_workers=dataset.config.workers,
        multiprocessing_context="fork" if dataset.config.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent,
        generator=torch.Generator(),  # its own: drawing worker seeds from the global one would change a resumed run
    )
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"a process that loads images died ({in_one_line(error)}); memory may have run out: lower data.workers, or "
            "look for huge images; the same command goes on"
        ) from error


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C, and a launcher's or a scheduler's SIGTERM, reach all processes; the batches in work are still needed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: Any) -> None:
    timer = threading.Timer(LONGEST_STEP_LEFT, os._exit, (0,))
    timer.daemon = True
    timer.start()


class _ErrorsAsValues(Dataset):
    """DataLoader turns a worker's exception into a page of traceback; a value comes through as it is."""

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            return self.dataset[index]
        except DataError as error:
            return error


def _first_error(outcomes: list[Sample | DataError]) -> DataError | None:
    return next((outcome for outcome in outcomes if isinstance(outcome, DataError)), None)
