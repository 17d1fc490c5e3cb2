"""Ctrl-C that loses nothing."""

import signal
import sys
from types import TracebackType
from typing import Any


class StopSignal:
    """Notes the first SIGINT or SIGTERM; the second does what it would have done."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}  # signal -> handler

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.asked = True
        self.__exit__(None, None, None)
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)
