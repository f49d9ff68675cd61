"""Why a job of several processes ends: every failure that is known of, and the one that caused the others."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from slotmamba.errors import one_line
from slotmamba.outcome import FAILURE, outcome


class Cause(IntEnum):
    """Kinds of failure: of two, the smaller is the cause of the greater."""

    REFUSED = 0
    """Bad input or a failure with a message of its own."""
    BUG = 1
    """Any other exception."""
    GONE = 2
    """The process has ended without a word: killed, out of memory, crashed."""
    STUCK = 3
    """No step within the time limit."""
    COMMUNICATION = 4
    """A collective has failed, as they do when another rank ends."""


@dataclass(frozen=True)
class Failure:
    rank: int
    cause: Cause
    text: str
    code: int


@dataclass(frozen=True)
class Verdict:
    """What the terminal is told, with which code all ranks exit, and whether they leave their stacks."""

    text: str
    code: int
    stacks: bool


def failure_of(error: BaseException, rank: int) -> Failure:
    """The failure that an exception is."""
    known = outcome(error)
    if known and not _of_communication(error):
        return Failure(rank, Cause.REFUSED, known.message, known.code)
    cause = Cause.COMMUNICATION if _of_communication(error) else Cause.BUG
    return Failure(rank, cause, one_line(f"{type(error).__name__}: {error}"), FAILURE)


def _of_communication(error: BaseException) -> bool:
    """Whether it comes out of torch.distributed: gloo's errors are plain RuntimeErrors."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and "/torch/distributed/" in frames[-1].filename.replace("\\", "/")
    return isinstance(error, RuntimeError) and (inside or "gloo/" in str(error) or "NCCL" in str(error))


def judge(failures: Sequence[Failure], size: int, logs: Path | None) -> Verdict:
    """The verdict over failures in the order in which they became known, in a world of `size` ranks."""
    first = min(failures, key=lambda failure: failure.cause)
    alike = [failure.rank for failure in failures if (failure.cause, failure.text) == (first.cause, first.text)]
    everywhere = (0 in alike and first.cause == Cause.REFUSED) or len(alike) == size
    text = first.text if everywhere or first.cause in (Cause.GONE, Cause.STUCK) else f"rank {first.rank}: {first.text}"
    if first.cause == Cause.REFUSED:
        return Verdict(text, first.code, stacks=False)
    if logs is None:
        return Verdict(text, first.code, stacks=True)
    where = f"stacks of all ranks: {logs}/stacks-*.txt"
    if first.cause in (Cause.BUG, Cause.COMMUNICATION):
        where = f"traceback: {logs / f'rank-{first.rank:05d}.log'}, {where}"
    return Verdict(f"{text}; {where}", first.code, stacks=True)
