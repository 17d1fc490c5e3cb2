"""Ctrl-C that loses nothing."""

import os
import signal
import sys
import time
from types import TracebackType
from typing import Any

# Launchers pass on to each process what the terminal, or a cluster's scheduler, has sent to all of them already.
PASSED_ON = 3.0  # seconds within which signals are one


class StopSignal:
    """Notes the first SIGINT or SIGTERM, with those of the next PASSED_ON seconds; a later one does as ever."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}  # signal -> handler
        self._first = 0.0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
            print(
                f"stopping after this step; once more, {PASSED_ON:g} seconds from now or later, stops at once",
                file=sys.stderr,
                flush=True,
            )
        elif time.monotonic() - self._first >= PASSED_ON:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
