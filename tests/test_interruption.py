"""Signals while a run trains, and the share of its time that goes into updates."""

import os
import signal
import time

import pytest

from srpo_jax import goodput
from srpo_jax import interruption as interruption_lib
from srpo_jax.interruption import Interruption


def test_a_signal_is_noted_and_told_at_once_and_the_next_one_acts(monkeypatch):
    class Terminated(Exception):
        pass

    def terminate(number, frame):
        raise Terminated

    before, told, until = signal.signal(signal.SIGTERM, terminate), [], time.monotonic() + 30
    monkeypatch.setattr(interruption_lib.terminal, "say", told.append)
    try:
        with Interruption(lambda: "5 s more") as interruption:
            assert interruption.signal is None and interruption.seconds == 0
            os.kill(os.getpid(), signal.SIGTERM)
            while not told and time.monotonic() < until:  # by another thread: this one may be deep in an update
                time.sleep(0.01)
            assert told == ["SIGTERM: 5 s more"] and interruption.signal == signal.SIGTERM
            time.sleep(0.01)
            assert 0.01 <= interruption.seconds < 5
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
        assert signal.getsignal(signal.SIGTERM) is terminate and signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_goodput_is_the_share_of_good_updates_in_all_time_and_in_what_was_lost(monkeypatch):
    now = iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: next(now))
    clock = goodput.Goodput()
    assert clock.share(4.0, good=True) == pytest.approx(4 / 10)
    assert clock.share(5.0, good=False) == pytest.approx(4 / 20)
    clock.lose(10.0)
    assert clock.share(8.0, good=True) == pytest.approx(12 / 40)
