"""What happens when something goes wrong in a run of several processes, and what they leave behind to find out why.

The names below load when they are first used: who only reads heart-beats needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slotmamba.faults.logs import rank_log
    from slotmamba.faults.recorder import keep_flight_record
    from slotmamba.faults.watch import Limits, Watch, watched

_MODULE_OF = {
    "Limits": "watch",
    "Watch": "watch",
    "keep_flight_record": "recorder",
    "rank_log": "logs",
    "watched": "watch",
}

__all__ = ["Limits", "Watch", "keep_flight_record", "rank_log", "watched"]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
