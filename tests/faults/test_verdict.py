"""Which rank is behind, which failure is the cause of the others, and what an exception is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slotmamba.errors import InputError, TrainingError
from slotmamba.faults.heartbeat import Beat, Heartbeat, read_beats, who_is_behind
from slotmamba.faults.verdict import Cause, Failure, failure_of, judge


def beat(rank: int, step: int, waiting: bool = False) -> Beat:
    return Beat(rank, "host", 100 + rank, step, "training", waiting, 0.0)


@pytest.mark.parametrize(
    ("beats", "collectives", "expected"),
    [
        ([beat(0, 3, True), beat(1, 3), beat(2, 3, True)], {0: 9, 1: 8, 2: 9}, "rank 1 is behind: step 3, training"),
        ([beat(0, 3), beat(1, 2, True), beat(2, 3)], {0: 9, 1: 9, 2: 9}, "rank 1 is behind: step 2, training"),
        ([beat(0, 3), beat(1, 3), beat(2, 3)], {0: 9, 1: 9, 2: 8}, "rank 2 is behind: step 3, training"),
        ([beat(0, 3), beat(1, 3), beat(2, 3)], {0: 9, 1: 7, 2: 7}, "ranks 1, 2 are behind: step 3, training"),
        ([beat(0, 3), beat(1, 3), beat(2, 3)], {0: None, 1: None, 2: None}, "all ranks are at step 3, training"),
        ([beat(0, 3), beat(1, 3), beat(2, 3)], {0: 9, 2: 9}, "rank 1 does not answer (stopped?): step 3, training"),
        ([beat(0, 3)], {0: 9}, "ranks 1, 2 do not answer (stopped?)"),
        ([], {0: 1, 1: 1, 2: 1}, "no rank has begun"),
    ],
)
def test_who_is_behind(beats: list[Beat], collectives: dict[int, int | None], expected: str) -> None:
    assert who_is_behind(beats, collectives, size=3).startswith(expected)


def test_beats_on_the_disk(tmp_path: Path) -> None:
    for rank in (0, 1, 5):  # rank 5 is of an earlier, larger world
        Heartbeat(tmp_path, rank).beat(rank, "saving", waiting=False)
    found = read_beats(tmp_path, size=3)
    assert [(each.rank, each.step, each.phase, each.waiting) for each in found] == [
        (0, 0, "saving", False),
        (1, 1, "saving", False),
    ]


def test_a_beat_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heartbeat = Heartbeat(tmp_path / "missing", 0)
    for step in range(3):
        heartbeat.beat(step, "training", waiting=False)
    (record,) = caplog.records
    assert (
        record.message
        == f"heart-beats are not written: {tmp_path}/missing/heartbeat-00000.tmp: No such file or directory"
    )


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "cause", "code", "text"),
    [
        (InputError("no shards"), Cause.REFUSED, 2, "no shards"),
        (TrainingError("loss nan"), Cause.REFUSED, 1, "loss nan"),
        (FileNotFoundError(2, "No such file", "x"), Cause.REFUSED, 2, "x: No such file"),
        (KeyboardInterrupt(), Cause.REFUSED, 130, "interrupted"),
        (ZeroDivisionError("a\nbug"), Cause.BUG, 1, "ZeroDivisionError: a bug"),
        (RuntimeError("shapes differ"), Cause.BUG, 1, "RuntimeError: shapes differ"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), Cause.COMMUNICATION, 1,
         "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        (torch.distributed.DistBackendError("NCCL error"), Cause.COMMUNICATION, 1, "DistBackendError: NCCL error"),
    ],
)  # fmt: skip
def test_failures(error: BaseException, cause: Cause, code: int, text: str) -> None:
    assert failure_of(raised(error), 3) == Failure(3, cause, text, code)


LOGS = Path("run/logs")
STACKS = "stacks of all ranks: run/logs/stacks-*.txt"


def failure(rank: int, cause: Cause, text: str = "why", code: int = 1) -> Failure:
    return Failure(rank, cause, text, code)


@pytest.mark.parametrize(
    ("failures", "text", "code"),
    [
        ([failure(2, Cause.REFUSED, code=2)], "rank 2: why", 2),
        ([failure(2, Cause.REFUSED, code=2), failure(0, Cause.REFUSED, code=2)], "why", 2),
        ([failure(1, Cause.COMMUNICATION), failure(2, Cause.GONE, "rank 2 is gone")], f"rank 2 is gone; {STACKS}", 1),
        ([failure(0, Cause.STUCK), failure(1, Cause.BUG, "a bug")],
         f"rank 1: a bug; traceback: run/logs/rank-00001.log, {STACKS}", 1),
        ([failure(each, Cause.BUG) for each in (2, 0, 1)], f"why; traceback: run/logs/rank-00002.log, {STACKS}", 1),
        ([failure(0, Cause.COMMUNICATION)], f"rank 0: why; traceback: run/logs/rank-00000.log, {STACKS}", 1),
    ],
)  # fmt: skip
def test_the_cause_of_several_failures(failures: list[Failure], text: str, code: int) -> None:
    verdict = judge(failures, size=3, logs=LOGS)
    assert (verdict.text, verdict.code) == (text, code)
    assert verdict.stacks == (STACKS in text)
