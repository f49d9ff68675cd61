"""What Slurm says of jobs: one question for all of them, and never a wait without an end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from slotmamba.errors import one_line

SECONDS = 10.0
_FIELDS = "%i|%T|%r|%N|%S"  # job, state, reason, nodes, start
_ACCOUNT_FIELDS = "JobID,State,Reason,NodeList,Start"
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
_ENDED |= {"REVOKED", "TIMEOUT"}
_ENDED_REASONS = ("None", "NonZeroExitCode")


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one element of an array, whose `id` is then like 12_3.

    state: without what Slurm adds to it; reason: why it waits or ended, empty where Slurm knows none; nodes: as Slurm
    writes them, empty before it starts; began: when it started or is expected to, in seconds since 1970.
    """

    id: str
    state: str
    reason: str
    nodes: str
    began: float | None

    @property
    def ended(self) -> bool:
        return self.state in _ENDED


@dataclass
class Queue:
    """Answers, by the id of the job, and one line for each question that was not answered."""

    jobs: dict[str, QueuedJob] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def ask_squeue(ids: Sequence[str]) -> Queue:
    """The jobs that wait or run, and those that ended within the last minutes (MinJobAge)."""
    if not ids:
        return Queue()
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}", f"--format={_FIELDS}"]
    return _asked(command)


def ask_sacct(ids: Sequence[str]) -> Queue:
    """The jobs of any time, where the cluster keeps accounts of them."""
    if not ids:
        return Queue()
    command = ["sacct", "--noheader", "--allocations", "--parsable2", f"--format={_ACCOUNT_FIELDS}"]
    return _asked([*command, f"--jobs={','.join(ids)}"])


def _asked(command: Sequence[str]) -> Queue:
    said, problem = answer(command)
    if "Invalid job id specified" in (problem or ""):  # of a single job that squeue has forgotten
        return Queue()
    problems = [problem] if problem else []
    jobs = {}
    for line in said.splitlines():
        if line.count("|") == _FIELDS.count("|"):
            job = _job(line)
            jobs[job.id] = job
        else:
            problems.append(f"{command[0]} says {line!r}, which is not of a job")
    return Queue(jobs, problems)


def answer(command: Sequence[str]) -> tuple[str, str | None]:
    """What a command of Slurm's prints, and in one line why it has failed, if it has."""
    program = command[0]
    if shutil.which(program) is None:
        return "", f"there is no {program} on PATH"
    # A session of its own: a wrapper's children would otherwise hold the pipes open when it is killed.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "", f"{program} does not answer within {SECONDS:g} seconds"
    return out, f"{program}: {one_line(err) or 'it has failed'}" if process.returncode else None


def _job(line: str) -> QueuedJob:
    """A line of either command; the state may be `CANCELLED by 0`, and unknown values are words in many forms."""
    number, state, reason, nodes, began = line.split("|")
    return QueuedJob(
        id=number,
        state=state.split()[0],
        reason="" if reason in _ENDED_REASONS else reason,
        nodes="" if nodes.startswith("None assigned") else nodes,
        began=_time(began),
    )


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A, Unknown
        return None
