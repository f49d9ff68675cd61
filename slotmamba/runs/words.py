"""Numbers as people read them."""

from __future__ import annotations


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


def number(value: float | None, form: str) -> str:
    """`value` in a format of Python's; ``-`` for none."""
    return "-" if value is None else format(value, form)
