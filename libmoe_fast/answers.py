"""Answers on disk as they come, so that an evaluation that is killed goes on where it was.

    folder/TASK.RANK.jsonl     one line per answered question: which one, the answer, and where its image tokens went

A line counts for a later run if checkpoint, settings, task, question and data are the same; lines of other runs stay
and are not read. A line that was cut off by the end of its process is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class AnswerStore:
    """The answers of one checkpoint with one set of settings.

    Args:
        folder: is made when the first answer comes.
        run: all that an answer depends on beside the question, JSON-able.
        rank: of this process, which writes files of its own and reads all.
    """

    def __init__(self, folder: str | Path, run: Any, rank: int = 0) -> None:
        self.folder, self.rank = Path(folder), rank
        self.run = _digest(run)
        self._open: dict[str, TextIO] = {}
        self.reload()

    def key(self, *question: Any) -> str:
        """Of a question: the task, its number, its text, its settings, the data's fingerprint."""
        return _digest([self.run, *question])

    def get(self, key: str) -> dict[str, Any] | None:
        """{"answer", "categories", "images", "layers"}, or None where there is none yet."""
        return self._known.get(key)

    @property
    def empty(self) -> bool:
        return not self._known

    def reload(self) -> None:
        """Reads what all processes have written."""
        lines = (line for line in read_lines(self.folder) if line.get("run") == self.run and "key" in line)
        self._known: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}

    def add(self, task: str, key: str, line: dict[str, Any]) -> None:
        """Writes an answer; it is on its way to the disk when this returns, whatever happens to this process."""
        if task not in self._open:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{task}.{self.rank}.jsonl"
            _end_last_line(path)
            self._open[task] = path.open("a", encoding="utf-8")
        whole = {"run": self.run, "key": key, "task": task, **line}
        self._open[task].write(json.dumps(whole, ensure_ascii=False) + "\n")
        self._open[task].flush()
        self._known[key] = whole

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """All answers in a folder, of whatever run; a line that a killed process was writing is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict):
                        yield line


def _end_last_line(path: Path) -> None:
    """A killed process leaves half a line; what comes next must not continue it."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
