"""Every start of a run and how it ended, from the log of rank 0 and what its jobs say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from slotmamba.errors import one_line

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+ slotmamba\.(?:faults\.logs|progress): (.*)")
_START = re.compile(r"rank 0 of (\d+): process \d+ on (\S+)")
_RESUMED = re.compile(r"\S+: (?:starts|resumes after step (\d+))\b")
_EARLIER_END = re.compile(r"ends after step (\d+), where source ")
_STOPPED = re.compile(r"(.+): saved at step (\d+) of (\d+); the same command resumes: ")
_FINISHED = re.compile(r"\S+: finished (\d+) steps: ")
_FAILED = re.compile(r"the process fails: (.*)")
_VERDICT = "the job ends: "


@dataclass(frozen=True)
class End:
    """kind: `FINISHED`, `STOPPED` (saved, to be resumed) or `FAILED`; reason: what stopped it, or the error."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Start:
    """One start of the processes of a run.

    time: in seconds since 1970; nodes: hosts, as far as they are known; step: steps done before; total: steps asked
    for, where the log says so; end: None while it runs, and for good if it ended without a word; job: its number.
    """

    time: float
    processes: int
    nodes: tuple[str, ...]
    step: int | None = None
    total: int | None = None
    end: End | None = None
    job: str | None = None


def read_starts(run_dir: Path) -> list[Start]:
    """All starts of a run, in their order; those that failed before they had a log are not among them.

    Raises:
        OSError: there is a log and it cannot be read.
    """
    try:
        with (run_dir / "logs" / "rank-00000.log").open(errors="replace") as log:
            return starts_in(log)
    except FileNotFoundError:
        return []


def starts_in(lines: Iterable[str]) -> list[Start]:
    """The starts in the log of rank 0."""
    starts: list[Start] = []
    for line in lines:
        found = _LINE.match(line)
        if found and (began := _START.fullmatch(found[2])):
            time = datetime.fromisoformat(found[1]).timestamp()
            starts.append(Start(time, int(began[1]), (began[2],)))
        elif starts and found:
            starts[-1] = _told(starts[-1], found[2])
        elif starts and line.startswith(_VERDICT):  # after an exception, which it may have a better reason for
            starts[-1] = replace(starts[-1], end=End(FAILED, one_line(line.removeprefix(_VERDICT))))
    return starts


def _told(start: Start, message: str) -> Start:
    """`start`, with what a message says about it."""
    if found := _RESUMED.match(message):
        return replace(start, step=int(found[1] or 0))
    if found := _EARLIER_END.match(message):
        return replace(start, total=int(found[1]))
    if found := _STOPPED.match(message):
        return replace(start, total=int(found[3]), end=End(STOPPED, found[1]))
    if found := _FINISHED.match(message):
        return replace(start, total=int(found[1]), end=End(FINISHED, "all steps done"))
    if found := _FAILED.match(message):
        return replace(start, end=End(FAILED, found[1]))
    if message == "the process ends" and start.end is None:
        return replace(start, end=End(FINISHED, "all steps were done"))
    return start


def merged(logged: Sequence[Start], jobs: Sequence[Start]) -> list[Start]:
    """The starts of both, oldest first. The first are of training, the second of the tasks around it, which say more of
    the end; some ended before training began, and some training no job started."""
    starts = []
    left = list(logged)
    for number, start in enumerate(jobs):
        until = jobs[number + 1].time if number + 1 < len(jobs) else math.inf
        inside = [each for each in left if start.time <= each.time < until]
        starts += [_as_one(inside[0], start) if inside else start, *inside[1:]]
        left = [each for each in left if each not in inside]
    return sorted([*starts, *left], key=lambda start: start.time)


def _as_one(logged: Start, job: Start) -> Start:
    end = job.end or logged.end
    if job.end and logged.end and job.end.kind == logged.end.kind == FAILED:
        end = End(FAILED, f"{job.end.reason}: {logged.end.reason}")
    if (
        job.end and logged.end and (job.end.kind, logged.end.kind) == (FINISHED, STOPPED)
    ):  # by Ctrl-C, say: not the task
        end = logged.end
    return replace(logged, nodes=job.nodes, end=end, job=job.job)
