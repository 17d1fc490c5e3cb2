"""Writing files so that a reader never sees half of one, whenever the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replace `path` by `content` in one rename; an interrupted write leaves the old file as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Forces a folder and all that is in it to disk: only then may it be given its final name."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
