"""Where each rank is: a small file a rank, replaced at every step boundary."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """Contents of RUN_DIR/logs/heartbeat-00000.json.

    step: steps done; phase: what it does now, such as "training" or "saving"; waiting: it has come to a point where
    it waits for all other ranks; time: of the beat, in seconds since 1970, on the rank's own clock.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    waiting: bool
    time: float

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} (process {self.pid} on {self.host})"


class Heartbeat:
    """Writes a rank's beats, some 100 microseconds each on a local disk.

    They are not synced: they say where a process was, which after a power cut is of no interest. That one cannot be
    written is a warning, once.
    """

    def __init__(self, logs: Path, rank: int) -> None:
        self._path = logs / f"heartbeat-{rank:05d}.json"
        self._temporary = self._path.with_suffix(".tmp")
        self._rank, self._host, self._pid = rank, socket.gethostname(), os.getpid()
        self._failed = False

    def beat(self, step: int, phase: str, waiting: bool) -> None:
        beat = Beat(self._rank, self._host, self._pid, step, phase, waiting, time.time())
        try:
            self._temporary.write_text(json.dumps(asdict(beat)))
            self._temporary.replace(self._path)
        except OSError as error:
            if not self._failed:
                logger.warning("heart-beats are not written: %s: %s", error.filename or self._path, error.strerror)
            self._failed = True


def read_beats(logs: Path) -> list[Beat]:
    """The last beat of each rank that has made one, in the order of ranks."""
    return [Beat(**json.loads(path.read_bytes())) for path in sorted(logs.glob("heartbeat-*.json"))]


def who_is_behind(beats: list[Beat]) -> str:
    """In words, the ranks that the others wait for: those with fewer steps, or that work where the others wait."""
    if not beats:
        return "no rank has begun"
    last = min(beats, key=_progress)
    behind = [beat for beat in beats if _progress(beat) == _progress(last)]
    if len(behind) == len(beats):
        return f"all ranks are at step {last.step}, {last.phase}"
    names = ", ".join(str(beat.rank) for beat in behind[:8]) + (", ..." if len(behind) > 8 else "")
    return f"rank {last.rank} is behind: {last}" if len(behind) == 1 else f"ranks {names} are behind: {last}"


def _progress(beat: Beat) -> tuple[int, bool]:
    return beat.step, beat.waiting
