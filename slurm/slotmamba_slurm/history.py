"""The starts of a run's jobs and how each of them ended: RUN_DIR/slurm/history.jsonl, one JSON object a line.

Written by the task of rank 0 alone, and only ever appended to: a record at each start, one at each end, and one where
Slurm has told later why a start ended.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from slotmamba_slurm.records import append_record, take_records

WITHOUT_A_WORD = "its processes died without a word, e.g. with their node"
NODE_FAILURE = "node failure"
LOCKED_OUT = "another job trains here"
Ended = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Start:
    """One start of a job, and how it ended."""

    job: str
    restart: int
    """How often the job was queued again before."""
    time: float
    """When the task of rank 0 started: seconds since 1970, as all times here."""
    submission: str
    """The folder beside history.jsonl of what was submitted, such as submission-001."""
    nodes: tuple[str, ...]
    processes: int
    resumed_from: int | None
    """Step of the newest checkpoint then; None: there was none."""
    ended_at: float | None = None
    """None: it is still running, or has not lived to say so."""
    ended: Ended | None = None
    signal: str | None = None
    """What it was told to stop by: SIGUSR2, SIGTERM or SIGINT."""
    exit_code: int | None = None
    """Of training; negative: the number of the signal that killed it."""
    step: int | None = None
    """The last one in metrics.jsonl when it ended."""
    checkpoint: int | None = None
    """Step of the newest checkpoint when it ended."""
    reason: str | None = None
    """finished, preempted, time limit, requeued by an operator, cancelled, node failure, training failed (exit code 1),
    ...; None while it runs, or while Slurm has yet to tell: the next start asks it."""
    bad_nodes: tuple[str, ...] = ()
    """Those of `nodes` that it ended because of."""
    excluded: tuple[str, ...] = ()
    """Nodes that the job was told after it to keep away from."""


@dataclass(frozen=True)
class _Key:
    event: str
    job: str
    restart: int


_START, _KEY = TypeAdapter(Start), TypeAdapter(_Key)


def history_file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "history.jsonl"


def read_history(run_dir: Path) -> list[Start]:
    """All starts of the run's jobs, the first one first; none where it was never submitted.

    Damaged lines are left out, such as one of which writing was cut short, and those of starts whose own is; a note
    says so.
    """
    starts: dict[tuple[str, int], Start] = {}

    def take(line: bytes) -> None:
        record = json.loads(line)
        key = _KEY.validate_python(record)
        own = (key.job, key.restart)
        if key.event != "start":
            if own not in starts:
                raise ValueError("the line of its start is damaged")
            record = asdict(starts[own]) | record
        starts[own] = _START.validate_python(record)

    take_records(history_file(run_dir), take)
    found = list(starts.values())
    return [
        replace(start, reason=WITHOUT_A_WORD) if start.ended is None and start.reason is None else start
        for start in found[:-1]
    ] + found[-1:]


def newest_checkpoint(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that is committed, which is what a start resumes from."""
    manifests = (run_dir / "checkpoints").glob("step-*/manifest.json")
    names = [re.fullmatch(r"step-([0-9]+)", path.parent.name) for path in manifests]
    return max((int(name[1]) for name in names if name), default=None)


def last_step(run_dir: Path) -> int | None:
    """The step of the last record in metrics.jsonl."""
    steps = []
    for line in _last_lines(run_dir / "metrics.jsonl", 65536):
        with suppress(ValueError):  # one that is torn, or damaged
            record = json.loads(line)
            steps += [record["step"]] if isinstance(record, dict) and isinstance(record.get("step"), int) else []
    return steps[-1] if steps else None


def _last_lines(path: Path, last_bytes: int) -> list[bytes]:
    """Of the last bytes of a file, if there is one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
            return file.read().splitlines()
    except FileNotFoundError:
        return []


class History:
    """Writes the history of a run: what happens to the start of a job that this process is of.

    A start that cannot be recorded raises OSError. What comes later is printed instead: a job that was stopped because
    its disk is full, say, has to be queued again all the same.
    """

    def __init__(self, run_dir: Path, job: str, restart: int) -> None:
        self.run_dir = run_dir
        self._key = {"job": job, "restart": restart}

    def until_own(self) -> list[Start]:
        """The starts up to this one, which is the last of them: another job of the run may have started since."""
        starts = read_history(self.run_dir)
        own = [self._key == {"job": start.job, "restart": start.restart} for start in starts].index(True)
        return starts[: own + 1]

    def started(self, submission: str, nodes: Sequence[str], processes: int) -> None:
        resumed_from = newest_checkpoint(self.run_dir)
        self._append(
            "start",
            time=time.time(),
            submission=submission,
            nodes=list(nodes),
            processes=processes,
            resumed_from=resumed_from,
        )

    def ended(
        self, ended: Ended, exit_code: int, reason: str | None, signal: str | None = None, bad_nodes: Sequence[str] = ()
    ) -> None:
        self._append_or_print(
            "end",
            ended_at=time.time(),
            ended=ended,
            signal=signal,
            exit_code=exit_code,
            step=last_step(self.run_dir),
            checkpoint=newest_checkpoint(self.run_dir),
            reason=reason,
            bad_nodes=list(bad_nodes),
        )

    def explained(self, start: Start, reason: str, bad_nodes: Sequence[str] = ()) -> None:
        """Records why an earlier start ended."""
        self._append_or_print("reason", job=start.job, restart=start.restart, reason=reason, bad_nodes=list(bad_nodes))

    def excluded(self, nodes: Sequence[str]) -> None:
        self._append_or_print("excluded", excluded=list(nodes))

    def _append_or_print(self, event: str, **values: Any) -> None:
        try:
            self._append(event, **values)
        except OSError as error:
            print(f"the history of the run cannot be written: {error}; {event}: {values}", flush=True)

    def _append(self, event: str, **values: Any) -> None:
        """Raises OSError; otherwise the line has reached the disk."""
        append_record(history_file(self.run_dir), {"event": event, **self._key, **values})
