"""The flag of one process; those of several are in tests/distributed/test_stopping.py."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from slotmamba.config.duration import seconds
from slotmamba.signals import SIGNALS, StopFlag
from slotmamba.world import World

ALONE = World.alone(torch.device("cpu"))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.agreed(ALONE)
        send(number)
        assert stop.agreed(ALONE) and stop.requested == number.name
        send(signal.SIGTERM)
        assert stop.agreed(ALONE) and stop.requested == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with StopFlag():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopFlag() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stop.agreed(ALONE)


def test_the_time_limit_leaves_room_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("slotmamba.signals.time.monotonic", lambda: now)
    with StopFlag(time_limit=1000) as stop:
        now += 949
        assert not stop.agreed(ALONE)  # a twentieth is kept free
        stop.took("step", 3)
        stop.took("save", 100)
        stop.took("save", 10)
        now -= 102.5
        assert not stop.agreed(ALONE)
        now += 1
        assert stop.agreed(ALONE) and stop.requested == "train.time_limit"
    with StopFlag(time_limit=10 * 24 * 3600) as stop:
        now += 10 * 24 * 3600 - 299
        assert stop.agreed(ALONE)  # at most five minutes


@pytest.mark.parametrize(
    ("text", "length"), [("90s", 90), ("45m", 2700), ("2h30m", 9000), ("1d12h", 129600), ("1d1h1m1s", 90061)]
)
def test_durations(text: str, length: int) -> None:
    assert seconds(text) == length
