"""Durations in recipes: ``90s``, ``45m``, ``2h30m``, ``1d12h``; a second to a year."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
# A year has eight digits of seconds.
_PATTERN = "^" + "".join(rf"([0-9]{{1,9}}{unit})?" for unit in _UNITS) + "$"
_LONGEST = 365 * _UNITS["d"]


def seconds(duration: str) -> int:
    """The length of a `Duration`."""
    return sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)([dhms])", duration))


def _in_range(duration: str) -> str:
    """0 would end what it limits at once; far longer ones overflow the clocks that they are given to."""
    if not 1 <= seconds(duration) <= _LONGEST:
        raise PydanticCustomError("duration_range", "a duration that is too short or too long")
    return duration


Duration = Annotated[
    str,
    Field(
        pattern=_PATTERN,
        min_length=2,
        json_schema_extra={"words": "a duration from 1s to 365d (90s, 45m, 2h30m, 1d12h)"},
    ),
    AfterValidator(_in_range),
]
