"""What Slurm knows of a job, and what it is asked to do with it."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from slotmamba_slurm.door import run_slurm

T = TypeVar("T")

SECONDS = 60  # that a command may take
CLOCKS = 2  # seconds that those of two nodes differ at most
PATIENCE = 600  # seconds in which `insist` asks again
PAUSE = 5.0  # seconds between two of its questions
REFUSALS = (
    "Invalid job id",
    "ccess/permission denied",
    "presently disabled",
    "not supported",
    "already complet",
    "already finished",
    "no longer pending",
)


class SlurmError(RuntimeError):
    """A command of Slurm's is not there, has failed or does not answer; the text is one line."""


class SlurmRefusalError(SlurmError):
    """It will fail the next time too."""


def insist(ask: Callable[[], T]) -> T:
    """What `ask` returns, which is called again while Slurm does not answer, as when its controller starts anew.

    Raises:
        SlurmError: Slurm has refused, or not answered for `PATIENCE` seconds.
    """
    deadline, said = time.monotonic() + PATIENCE, False
    while True:
        try:
            return ask()
        except SlurmRefusalError:
            raise
        except SlurmError as error:
            if time.monotonic() > deadline:
                raise
            if not said:
                print(f"{error}: asking again for up to {PATIENCE} s", flush=True)
                said = True
        time.sleep(PAUSE)


class SlurmJob:
    """A job, by its number; of an array NUMBER_INDEX. All methods raise SlurmError."""

    def __init__(self, number: str) -> None:
        self.number = number

    def fields(self) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState; times are seconds since 1970."""
        lines = _run("scontrol", "-o", "show", "job", self.number).splitlines()
        return dict(re.findall(r"(?:^|\s)([A-Za-z][\w:/]*)=(\S*)", lines[0]))

    def requeue(self) -> None:
        """Has it queued again; its processes are told to end, and killed KillWait seconds later."""
        _run("scontrol", "requeue", self.number)

    def exclude(self, nodes: Sequence[str]) -> None:
        """Keeps it away from `nodes` too. Slurm allows that while it is pending, which it is as soon as it was
        requeued."""
        before = self.fields()["ExcNodeList"]
        all_nodes = ",".join([*([] if before == "(null)" else [before]), *nodes])
        _run("scontrol", "update", f"job={self.number}", f"ExcNodeList={all_nodes}")

    def release(self) -> None:
        """Lets it start, which was submitted with --hold."""
        _run("scontrol", "release", self.number)

    def cancel_pending(self) -> None:
        """Cancels it, which has not started. With `--state=PENDING` scancel takes all jobs of an array that wait."""
        _run("scancel", self.number)

    def state_of_start(self, time: float) -> str | None:
        """How its start that ran at `time` has ended, by Slurm's accounts (`sacct`); None: they do not know it, or it
        runs."""
        table = _run("sacct", "-n", "-P", "-X", "--duplicates", "-j", self.number, "-o", "Start,End,State")
        for start, end, state in (line.split("|") for line in table.splitlines()):
            if start.isdigit() and end.isdigit() and int(start) - CLOCKS <= time <= int(end) + CLOCKS:
                return state.split()[0]  # without the "by UID" of CANCELLED
        return None


def nodes_down(nodes: Sequence[str], since: float, until: float | None) -> list[str]:
    """Those of `nodes` that went down in that time (None: until now), by Slurm's accounts, whatever they are now.

    Raises SlurmError.
    """
    earliest, latest = int(since) - CLOCKS, math.inf if until is None else until
    first = datetime.fromtimestamp(earliest - 1).strftime("%Y-%m-%dT%H:%M:%S")
    which = ["event", f"nodes={','.join(nodes)}", f"start={first}"]
    table = _run("sacctmgr", "-n", "-P", "show", *which, "format=NodeName,Start,State")
    events = [line.split("|") for line in table.splitlines()]
    down = {node for node, at, state in events if state.startswith("DOWN") and earliest <= int(at) <= latest}
    return [node for node in nodes if node in down]


def _run(*command: str) -> str:
    """What the command prints."""
    try:
        done = run_slurm(command, {"SLURM_TIME_FORMAT": "%s"}, SECONDS)
    except FileNotFoundError:
        raise SlurmRefusalError(f"there is no {command[0]} on PATH on this node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in {SECONDS} s") from None
    if done.returncode:
        refused = any(words in done.stderr for words in REFUSALS)
        kind = SlurmRefusalError if refused else SlurmError
        raise kind(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout
