"""Numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SPLIT = re.compile(r"(.*?)([0-9]*)\Z", re.DOTALL)


def duration(seconds: float) -> str:
    """The two largest units: ``42s``, ``3m05s``, ``2h10m``, ``4d03h``."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d{hours_left:02d}h"
    if hours:
        return f"{hours}h{minutes_left:02d}m"
    if minutes:
        return f"{minutes}m{rest:02d}s"
    return f"{whole}s"


def folded(hosts: Iterable[str]) -> str:
    """Names of hosts as Slurm writes them, ``node[1-3,7],login``; each once."""
    parts = [_SPLIT.findall(host)[0] for host in dict.fromkeys(hosts)]
    padded = {name for name, digits in parts if len(digits) > 1 and digits[0] == "0"}
    groups: dict[tuple[str, int], list[str]] = {}  # by what stands before the number, and its width if it has zeros
    for name, digits in parts:
        groups.setdefault((name, len(digits) if name in padded else 0), []).append(digits)
    return ",".join(_with_numbers(name, width, digits) for (name, width), digits in groups.items())


def _with_numbers(name: str, width: int, digits: list[str]) -> str:
    if len(digits) == 1:
        return name + digits[0]
    ranges: list[list[int]] = []
    for each in sorted(map(int, digits)):
        if ranges and each == ranges[-1][1] + 1:
            ranges[-1][1] = each
        else:
            ranges.append([each, each])
    return f"{name}[{','.join('-'.join(f'{end:0{width}d}' for end in dict.fromkeys(ends)) for ends in ranges)}]"


def number(value: float | None, form: str) -> str:
    """`value` in a format of Python's; ``-`` for none."""
    return "-" if value is None else format(value, form)
