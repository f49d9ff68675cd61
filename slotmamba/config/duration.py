"""Durations in recipes: ``90s``, ``45m``, ``2h30m``, ``1d12h``."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PATTERN = "^" + "".join(rf"([0-9]+{unit})?" for unit in _UNITS) + "$"

Duration = Annotated[
    str,
    Field(pattern=_PATTERN, min_length=2, json_schema_extra={"words": "a duration such as 90s, 45m, 2h30m or 1d12h"}),
]


def seconds(duration: str) -> int:
    """The length of a `Duration`."""
    return sum(int(count) * _UNITS[unit] for count, unit in re.findall(r"([0-9]+)([dhms])", duration))
