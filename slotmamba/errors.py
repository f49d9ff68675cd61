"""Failures of a run that are nobody's bug: the command line prints them as one line and exits 1."""

from __future__ import annotations


class SlotMambaError(RuntimeError):
    """A run cannot go on. For what a user wrote wrongly there is ValueError."""


class TrainingError(SlotMambaError):
    """Training has to stop, for example because the loss is not finite."""
