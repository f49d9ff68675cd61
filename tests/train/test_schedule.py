from __future__ import annotations

import itertools
import math

import pytest

from slotmamba.config.schema import OptimConfig
from slotmamba.schedule import learning_rate

SCHEDULES = ["cosine", "wsd", "linear"]


def rates(total: int, steps: int | None = None, **optim: object) -> list[float]:
    config = OptimConfig(**{"lr": 0.01, "min_lr_ratio": 0.1, **optim})
    return [learning_rate(config, step, total) for step in range(total if steps is None else steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0), (100, 1), (100, 10), (100, 98), (100, 99), (2, 0), (2, 1)])
def test_end_points(schedule: str, min_lr_ratio: float, total: int, warmup: int) -> None:
    values = rates(total, total + 50, schedule=schedule, min_lr_ratio=min_lr_ratio, warmup=warmup)
    end = 0.01 * min_lr_ratio
    assert values[0] == pytest.approx(0.01 / max(warmup, 1), rel=1e-15)
    if warmup:
        assert values[warmup - 1] == 0.01
    if warmup < total - 1:
        assert values[warmup] == 0.01
    # lingua's cosine jumps back to the peak right after the end (peers.md, A9).
    assert values[total - 1 :] == [end] * 51
    assert all(end <= value <= 0.01 for value in values[warmup:])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", [1e-18, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("warmup", [0, 7, 90])
def test_rises_in_the_warmup_and_never_after(schedule: str, decay: float, warmup: int) -> None:
    values = rates(100, schedule=schedule, decay=decay, warmup=warmup, min_lr_ratio=0.0)
    assert all(a < b for a, b in itertools.pairwise(values[:warmup]))
    after = values[max(0, warmup - 1) :]
    assert all(a >= b for a, b in itertools.pairwise(after))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_of_the_whole_run(schedule: str) -> None:
    values = rates(5, 8, schedule=schedule, warmup=5)
    assert values == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.001, 0.001, 0.001], rel=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1])
def test_the_only_step_of_a_run_has_the_peak(schedule: str, warmup: int) -> None:
    assert rates(1, 3, schedule=schedule, warmup=warmup, min_lr_ratio=0.0) == [0.01, 0.0, 0.0]


def test_cosine_in_between() -> None:
    values = rates(101, schedule="cosine")
    assert values[50] == pytest.approx(0.0055, rel=1e-12)
    assert values[25] == pytest.approx(0.001 + 0.009 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-12)


def test_linear_in_between() -> None:
    values = rates(111, schedule="linear", warmup=10)
    assert values[35] == pytest.approx(0.01 - 0.009 * 0.25, rel=1e-12)


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    values = rates(101, schedule="wsd", warmup=10, decay=0.2)
    assert values[9:81] == [0.01] * 72
    assert values[90] == pytest.approx(0.0055, rel=1e-12)


def test_wsd_that_always_decays_is_linear() -> None:
    for warmup in (0, 10):
        assert rates(50, schedule="wsd", decay=1.0, warmup=warmup) == rates(50, schedule="linear", warmup=warmup)
