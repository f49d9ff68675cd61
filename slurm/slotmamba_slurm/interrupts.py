"""Submitting is not cut in two: what would end this process waits until nothing is half done."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Yields what is to be called where stopping does no harm: it raises KeyboardInterrupt if one of `HELD` has come.
    The signal comes again, and does what it always does, at the end.

    By handlers, not by a mask, which holds for one thread only and is handed on to children.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in HELD}
    held = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in held:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), came[0])
