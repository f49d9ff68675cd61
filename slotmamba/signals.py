"""Asking a run to stop: Ctrl-C and SIGTERM set a flag that the loop looks at between steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class StopFlag:
    """While entered, SIGINT and SIGTERM only set `requested`; the loop saves and ends.

    Another SIGINT raises KeyboardInterrupt: someone does not want to wait. Another SIGTERM does nothing: job schedulers
    send it more than once, and the save under way is what the first one was for.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.requested is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
