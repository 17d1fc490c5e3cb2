"""Records in a memory-mapped file: 665,298 of them cost a process, and its data workers, no memory of their own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Record = dict[str, Any]

ROWS_AT_A_TIME = 1024
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),  # in the file that the record comes from
        ("image", pa.bool_()),
        ("length", pa.int64()),  # characters of the conversation
        ("json", pa.large_string()),
    ]
)


class RecordTable(Sequence[Record]):
    """Records by number, each parsed when it is asked for. An Arrow file, mapped: pages that all processes share."""

    def __init__(self, path: Path, rows: np.ndarray | None = None) -> None:
        self._path, self._rows = path, rows
        with pa.memory_map(str(path)) as source:
            self._table = pa.ipc.open_file(source).read_all()

    def __reduce__(self) -> tuple:
        return RecordTable, (self._path, self._rows)  # another process maps the same file

    def __len__(self) -> int:
        return self._table.num_rows if self._rows is None else len(self._rows)

    def __getitem__(self, number: int) -> Record:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        row = number % len(self) if self._rows is None else int(self._rows[number])
        record = json.loads(self._table["json"][row].as_py())
        record["index"] = self._table["index"][row].as_py()
        return record

    @property
    def has_image(self) -> list[bool]:
        return self._column("image").tolist()

    @property
    def lengths(self) -> list[int]:
        return self._column("length").tolist()

    def share(self, rows: Sequence[int]) -> RecordTable:
        """These rows alone, in this order; of the same mapping."""
        part = object.__new__(RecordTable)
        part._path, part._table, part._rows = self._path, self._table, np.asarray(rows, dtype=np.int64)
        return part

    def _column(self, name: str) -> np.ndarray:
        values = self._table[name].to_numpy()
        return values if self._rows is None else values[self._rows]


class TableWriter:
    """Writes records to an Arrow file as they come; as a context manager, `table` is there after it.

    Args:
        path: where to; none given = a temporary file, which is unlinked once it is mapped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._temporary = path is None
        if path is None:
            handle, name = tempfile.mkstemp(suffix=".arrow")
            os.close(handle)
            path = Path(name)
        self._path = path
        self._pending: list[tuple[int, bool, int, str]] = []
        self.rows = 0

    def __enter__(self) -> TableWriter:
        self._writer = pa.ipc.new_file(str(self._path), SCHEMA)
        return self

    def add(self, index: int, record: Record, text: str) -> None:
        """text: the record as JSON."""
        length = sum(len(turn["value"]) for turn in record["conversations"])
        self._pending.append((index, "image" in record, length, text))
        self.rows += 1
        if len(self._pending) == ROWS_AT_A_TIME:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self._pending, strict=True)) or [()] * len(SCHEMA)
        self._writer.write_batch(pa.record_batch([list(column) for column in columns], schema=SCHEMA))
        self._pending.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
        if kind is None:
            self.table = RecordTable(self._path)
        if self._temporary:
            self._path.unlink()
