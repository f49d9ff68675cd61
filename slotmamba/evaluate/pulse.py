"""Lines that show how far a measurement is."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 10.0  # seconds


class Pulse:
    """`say` prints a line, `tick` too, but only when the last line is ten seconds old."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def say(self, line: str) -> None:
        print(line, flush=True)
        self._last = self._clock()

    def tick(self, line: str) -> None:
        if self._clock() - self._last >= EVERY:
            self.say(line)
