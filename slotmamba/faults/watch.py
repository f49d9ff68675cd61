"""Watching the ranks of a run: one that fails, dies or hangs ends all of them, soon, and with the reason.

Every rank has a thread for it. Rank 0's hears from all (`link`), waits a moment for what else becomes known, decides on
the cause (`verdict`), tells all ranks and the terminal, and everyone leaves stacks and exits with the same code.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from slotmamba.config.duration import seconds
from slotmamba.config.schema import ParallelConfig
from slotmamba.faults.heartbeat import Beat, Heartbeat, read_beats, who_is_behind
from slotmamba.faults.link import Link, Message, connect
from slotmamba.faults.recorder import LAST_RESORT, Recorder, collectives_begun, set_collective_timeout
from slotmamba.faults.verdict import Cause, Failure, Verdict, failure_of, judge
from slotmamba.outcome import FAILURE
from slotmamba.world import World

TICK = 0.25  # seconds
GRACE = 1.0  # seconds between the first failure that can be a cause and the verdict
PATIENCE = 10.0  # seconds in which the cause of a collective's failure, an answer, or the verdict is waited for


@dataclass(frozen=True)
class Limits:
    """Seconds without a beat after which a rank counts as stuck: up to the first step, and after it."""

    first_step: float
    step: float

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Limits:
        return cls(seconds(parallel.first_step_timeout), seconds(parallel.step_timeout))

    @property
    def first_collective(self) -> float:
        """Timeout of collectives up to the first step: later than the watch, which knows more about the cause."""
        return self.first_step + LAST_RESORT


class Watch:
    """What a process tells of itself while it trains. Alone it has nobody to wait for, and nothing ends it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._logs: Path | None = None
        self._heartbeat: Heartbeat | None = None
        self._recorder: Recorder | None = None

    def begin(self, logs: Path, limits: Limits) -> None:
        """From here on beats are kept in the folder `logs`, and have to come within `limits`."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._heartbeat = Heartbeat(logs, self._world.rank)
        self._recorder = Recorder(logs, self._world.rank)

    def beat(self, step: int, phase: str, waiting: bool = False) -> None:
        """Says that `step` steps are done and what comes now; `waiting`: for all other ranks."""
        assert self._heartbeat is not None, "begin comes first"
        self._heartbeat.beat(step, phase, waiting)

    def first_step_done(self) -> None:
        """Nothing is compiled any more: the short limit holds."""

    def fail(self, error: BaseException) -> NoReturn:
        """Ends the process, and the job, for an exception that came to the end of the program."""
        raise error

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()


class SharedWatch(Watch, ABC):
    """The watch of one of several processes; its thread runs until `close`."""

    def __init__(self, world: World, link: Link) -> None:
        super().__init__(world)
        self._link = link
        self._terminal = os.dup(2)  # the log takes standard error's place in all ranks but 0
        self._limits: Limits | None = None
        self._limit = float("inf")
        self._last_beat = time.monotonic()
        self._own: queue.SimpleQueue[Failure] = queue.SimpleQueue()
        self._reported = False
        self._leaving = threading.Event()
        self._ended = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def begin(self, logs: Path, limits: Limits) -> None:
        super().begin(logs, limits)
        self._last_beat = time.monotonic()
        self._limits, self._limit = limits, limits.first_step

    def beat(self, step: int, phase: str, waiting: bool = False) -> None:
        super().beat(step, phase, waiting)
        self._last_beat = time.monotonic()
        assert self._recorder is not None
        self._recorder.end_after(self._limit + LAST_RESORT)

    def first_step_done(self) -> None:
        assert self._limits is not None, "begin comes first"
        self._limit = self._limits.step
        set_collective_timeout(self._limit + LAST_RESORT)

    def fail(self, error: BaseException) -> NoReturn:
        failure = failure_of(error, self._world.rank)
        self._own.put(failure)
        self._thread.join(2 * PATIENCE)  # it ends the process, with everybody's verdict
        self._end(judge([failure], self._world.size, self._logs), tell=True)

    def close(self) -> None:
        self._leaving.set()
        self._thread.join()
        self._link.close()
        os.close(self._terminal)
        super().close()

    def _run(self) -> None:
        while not self._leaving.is_set():
            for rank, message in self._link.poll(TICK):
                self._hear(rank, message)
            while not self._own.empty():
                self._learn(self._own.get())
            if not self._reported and time.monotonic() - self._last_beat > self._limit:
                text = f"no step for {self._limit:.0f} s"
                self._learn(Failure(self._world.rank, Cause.STUCK, text, FAILURE))
            self._decide()
        self._link.send({"kind": "left"})

    @abstractmethod
    def _hear(self, rank: int, message: Message) -> None:
        """Acts on a message of `rank`."""

    @abstractmethod
    def _learn(self, failure: Failure) -> None:
        """Takes note of a failure of this rank."""

    @abstractmethod
    def _decide(self) -> None:
        """Ends the process if it is time to."""

    def _beats(self) -> list[Beat]:
        return read_beats(self._logs, self._world.size) if self._logs else []

    def _end(self, verdict: Verdict, tell: bool) -> NoReturn:
        """Leaves what is to be left and exits, from whichever thread: the other may be stuck in a collective."""
        with self._ended:  # for good
            if self._recorder is not None:
                self._recorder.end_after(LAST_RESORT)
            if tell:
                lines = "".join(f"error: {line}\n" for line in verdict.text.splitlines())
                os.write(self._terminal, lines.encode())
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            if self._logs is not None:
                with (self._logs / f"rank-{self._world.rank:05d}.log").open("a") as log:
                    log.write(f"the job ends: {verdict.text}\n")
            if verdict.stacks and self._recorder is not None:
                self._recorder.dump(verdict.text)
            os._exit(verdict.code)


class ChiefWatch(SharedWatch):
    """Rank 0's watch, which decides."""

    def __init__(self, world: World, link: Link) -> None:
        self._failures: list[Failure] = []
        self._failed_at = 0.0
        self._gone: set[int] = set()
        self._collectives: dict[int, int | None] = {}
        super().__init__(world, link)

    def _hear(self, rank: int, message: Message) -> None:
        match message["kind"]:
            case "left":
                self._gone.add(rank)
            case "failed":
                failure = Failure(**message["failure"])
                self._learn(Failure(rank, Cause(failure.cause), failure.text, failure.code))
            case "collectives":
                self._collectives[rank] = message["begun"]
            case "gone":
                if rank not in self._gone and all(failure.rank != rank for failure in self._failures):
                    seen = "".join(f", last seen at {beat}" for beat in self._beats() if beat.rank == rank)
                    text = f"rank {rank} has ended without a word (killed? out of memory?){seen}"
                    self._learn(Failure(rank, Cause.GONE, text, FAILURE))

    def _learn(self, failure: Failure) -> None:
        if failure.rank == self._world.rank:
            self._reported = True
        if not self._failures:
            self._failed_at = time.monotonic()
        if failure.cause == Cause.STUCK and not self._collectives:
            self._collectives[0] = collectives_begun()
            self._link.send({"kind": "where"})
        self._failures.append(failure)

    def _decide(self) -> None:
        if not self._failures:
            return
        cause = min(failure.cause for failure in self._failures)
        known = cause <= Cause.GONE or (cause == Cause.STUCK and len(self._collectives) == self._world.size)
        if time.monotonic() - self._failed_at > (GRACE if known else PATIENCE):
            if cause == Cause.STUCK:
                position = who_is_behind(self._beats(), self._collectives, self._world.size)
                self._failures = [replace(each, text=f"{each.text}: {position}") for each in self._failures]
            verdict = judge(self._failures, self._world.size, self._logs)
            self._link.send({"kind": "verdict", "verdict": asdict(verdict)})
            self._end(verdict, tell=True)


class MemberWatch(SharedWatch):
    """The watch of all other ranks, which report to rank 0 and do as it says."""

    def __init__(self, world: World, link: Link) -> None:
        self._failure: Failure | None = None
        self._reported_at = 0.0
        super().__init__(world, link)

    def _hear(self, rank: int, message: Message) -> None:
        match message["kind"]:
            case "verdict":
                self._end(Verdict(**message["verdict"]), tell=False)
            case "where":
                self._link.send({"kind": "collectives", "begun": collectives_begun()})
            case "left":
                self._leaving.set()
            case "gone":
                text = "rank 0 has ended without a word (killed? out of memory?)"
                self._end_without_chief(Failure(0, Cause.GONE, text, FAILURE))

    def _learn(self, failure: Failure) -> None:
        self._reported = True
        self._failure, self._reported_at = failure, time.monotonic()
        self._link.send({"kind": "failed", "failure": asdict(failure)})

    def _decide(self) -> None:
        if self._failure is not None and time.monotonic() - self._reported_at > PATIENCE + 2 * GRACE:
            self._end_without_chief(replace(self._failure, text=f"{self._failure.text}: rank 0 does not answer"))

    def _end_without_chief(self, failure: Failure) -> NoReturn:
        self._end(judge([failure], self._world.size, self._logs), tell=self._world.rank == 1)


@contextmanager
def watched(world: World) -> Iterator[Watch]:
    """Watches all ranks of `world` until the block is left; an exception that leaves it ends all of them.

    In a world of one it only keeps that process's beats, and exceptions go on as they are.
    """
    watch = _watch_of(world)
    try:
        yield watch
    except BaseException as error:
        watch.fail(error)
    finally:
        watch.close()


def _watch_of(world: World) -> Watch:
    if world.size == 1:
        return Watch(world)
    return (ChiefWatch if world.is_main else MemberWatch)(world, connect(world))
