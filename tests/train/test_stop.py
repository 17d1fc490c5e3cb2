"""What ends a run, sent as terminals, launchers and schedulers send it."""

import itertools
import os
import signal

import pytest

from libmoe_fast.train import stop
from libmoe_fast.train.stop import PASSED_ON, StopSignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(("first", "second"), itertools.product(SIGNALS, SIGNALS))
def test_what_a_launcher_passes_on_is_one_signal(clock, first, second, capsys):
    """Ctrl-C reaches all processes, and torchrun sends its workers another; a scheduler's SIGTERM likewise."""
    with StopSignal() as asked:
        os.kill(os.getpid(), first)
        assert asked.asked
        clock[0] += 0.9 * PASSED_ON
        os.kill(os.getpid(), second)
        os.kill(os.getpid(), first)
    assert capsys.readouterr().err.count("stopping after this step") == 1


def test_a_later_one_stops_at_once(clock):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += PASSED_ON
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_as_before():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal() as asked:
        assert not asked.asked
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
