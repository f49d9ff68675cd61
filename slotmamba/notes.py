"""What a command says beside its answer, on standard error."""

from __future__ import annotations

import sys
from functools import cache


@cache
def note_once(line: str) -> None:
    """Prints a note, however often it is asked to: those who follow a run read its files again and again."""
    print(f"note: {line}", file=sys.stderr, flush=True)
