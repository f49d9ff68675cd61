"""Asking a run to stop: signals and a time limit set a flag that all ranks look at together, between steps."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from slotmamba.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 only set `requested`; the loop saves and ends.

    Another SIGINT raises KeyboardInterrupt: someone does not want to wait. Under torchrun it does not, since torchrun
    sends on what the terminal has sent to all processes already. Another of the others does nothing: job schedulers
    send more than one, and the save under way is what the first was for.

    A process that trains with others acts on what `agreed` says and on nothing else here, so that all of them do the
    same.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        """
        Args:
            time_limit: Seconds from entering, now, in which the run is to have saved and ended; None for as many as it
                takes.
        """
        self.requested: str | None = None
        self._time_limit = time_limit
        self._longest: dict[str, float] = {}
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._entered = time.monotonic()
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def took(self, what: str, seconds: float) -> None:
        """Tells how long a step or a save took. The time limit leaves room for one more of the longest of each."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))

    def agreed(self, world: World) -> bool:
        """Whether any process of `world` is to stop; a collective, with one answer for all, who from then on share the
        reason."""
        if self.requested is None and self._time_is_up():
            self.requested = "train.time_limit"
        if not world.any(self.requested is not None):
            return False
        reasons = world.gather(self.requested) or []
        first = next((rank for rank, reason in enumerate(reasons) if reason is not None), 0)
        where = f" on rank {first}" if world.size > 1 and len(set(reasons)) > 1 else ""
        reason = f"{reasons[first]}{where}" if reasons else None
        self.requested = world.broadcast(reason)
        return True

    def _time_is_up(self) -> bool:
        """A twentieth of the limit, at most five minutes, is kept free for what no step and no save has shown yet."""
        if self._time_limit is None:
            return False
        needed = min(self._time_limit / 20, 300.0) + sum(self._longest.values())
        return time.monotonic() - self._entered + needed > self._time_limit

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
        elif number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
