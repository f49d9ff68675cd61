"""Many runs: a line each, or JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from slotmamba.runs.status import Status
from slotmamba.runs.words import duration, number
from slotmamba.tables import table

KEYS = tuple(field.name for field in fields(Status))
_HEADER = ("run", "state", "step", "loss", "tokens/s", "ETA", "seen", "restarts", "nodes", "why")
_LEFT = ("state", "nodes", "why")


def ordered(statuses: Sequence[Status], key: str) -> list[Status]:
    """Sorted by a field of `Status`, ascending; those that lack it come last."""

    def place(status: Status) -> tuple[bool, Any]:
        value = getattr(status, key)
        return (value is None, 0 if value is None else value)

    return sorted(statuses, key=place)


def as_json(statuses: Sequence[Status]) -> str:
    """An array of objects with the fields of `Status`."""
    return json.dumps([asdict(status) for status in statuses], indent=2)


def as_table(statuses: Sequence[Status]) -> str:
    """A line for each run; `seen` is how long ago it last gave a sign of life."""
    now = time.time()
    return table(_HEADER, [_row(status, now) for status in statuses], _LEFT)


def _row(status: Status, now: float) -> Sequence[str]:
    return (
        status.name,
        status.state,
        f"{status.step}/{number(status.total, 'd')}",
        number(status.loss, ".4f"),
        number(status.tokens_per_second, ",.0f"),
        "-" if status.eta is None else duration(status.eta),
        "-" if status.seen is None else duration(now - status.seen),
        str(status.restarts),
        status.nodes or "-",
        status.why,
    )


def broken_lines(statuses: Sequence[Status]) -> Mapping[str, int]:
    """Runs whose metrics.jsonl has lines that are no records, and how many."""
    return {status.name: status.broken for status in statuses if status.broken}
