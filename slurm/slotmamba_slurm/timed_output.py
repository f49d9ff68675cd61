"""Lines with the time in front, as in the logs of the ranks, between which `slotmamba runs logs` shows them."""

from __future__ import annotations

import io
from datetime import datetime
from typing import TextIO


class TimedLines(io.TextIOBase):
    """Standard output for a task. What its training process writes there itself is not touched."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begins = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(f"{_now()} INFO slotmamba_slurm.task: {line}" if self._begins else line)
            self._begins = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _now() -> str:
    return datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
