"""Where each rank is: a small file a rank, replaced at every step boundary."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from slotmamba.notes import note_once

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
    written is logged once; on a full disk it is for what matters, the metrics and checkpoints, to fail.
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
                logger.info("heart-beats are not written: %s: %s", error.filename or self._path, error.strerror)
            self._failed = True


def read_beats(logs: Path, size: int) -> list[Beat]:
    """The last beat of each of `size` ranks that has made one, in the order of ranks. Damaged ones are left out, and a
    note says so."""
    paths = [logs / f"heartbeat-{rank:05d}.json" for rank in range(size)]
    beats = [_read(path) for path in paths if path.is_file()]
    return [beat for beat in beats if beat is not None]


_BEAT = TypeAdapter(Beat)


def _read(path: Path) -> Beat | None:
    try:
        return _BEAT.validate_json(path.read_bytes())
    except ValueError:
        note_once(f"{path} is damaged and left out")
        return None


def who_is_behind(beats: list[Beat], collectives: Mapping[int, int | None], size: int) -> str:
    """In words, which of `size` ranks the others wait for.

    Args:
        beats: the last of each rank.
        collectives: how many collectives each rank has begun that answers when it is asked; None: it does not know.

    A rank that does not answer comes first; then those with the fewest steps, or that work where others wait; then
    those that have begun fewer collectives in their step than the others.
    """
    silent = [rank for rank in range(size) if rank not in collectives]
    if silent:
        return f"{_names(silent, 'does', 'do')} not answer (stopped?){_last(beats, silent[0])}"

    def progress(beat: Beat) -> tuple[int, bool, int]:
        return beat.step, beat.waiting, collectives[beat.rank] or 0

    least = min(map(progress, beats), default=None)
    behind = [beat.rank for beat in beats if progress(beat) == least]
    if len(behind) == size:
        return f"all ranks are at step {beats[0].step}, {beats[0].phase}"
    return f"{_names(behind, 'is', 'are')} behind{_last(beats, behind[0])}" if behind else "no rank has begun"


def _last(beats: list[Beat], rank: int) -> str:
    return next((f": {beat}" for beat in beats if beat.rank == rank), "")


def _names(ranks: list[int], one: str, several: str) -> str:
    """Subject and verb."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''} {several}"
