"""Failures of a run, and the parts of error messages that several modules share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from slotmamba_data.errors import InputError

__all__ = ["InputError", "SlotMambaError", "TrainingError", "one_line", "suggestion"]


class SlotMambaError(RuntimeError):
    """A run cannot go on, and it is nobody's bug: the command line prints one line and exits 1.

    For what a user wrote wrongly there is InputError.
    """


class TrainingError(SlotMambaError):
    """Training has to stop, for example because the loss is not finite."""


def suggestion(name: str, valid: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the valid name nearest to `name`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(text: object) -> str:
    """`text` with every run of white space, line breaks included, as one space."""
    return " ".join(str(text).split())
