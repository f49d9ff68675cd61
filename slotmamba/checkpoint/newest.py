"""Which of a folder's checkpoints to take: the newest that holds what was written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from slotmamba.checkpoint.group import Group
from slotmamba.checkpoint.manifest import DamagedCheckpointError, claimed_steps
from slotmamba.errors import SlotMambaError

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


def load_newest(folder: Path, load: Callable[[int], Loaded], group: Group | None = None) -> tuple[int, Loaded] | None:
    """What `load` makes of the newest checkpoint in ``folder`` that is not damaged.

    Args:
        folder: The checkpoints of a run.
        load: Takes a step; raises DamagedCheckpointError for one to pass over, which a warning then names.
        group: The processes that load together, this one alone by default. In all of them ``load`` does the same.

    Returns:
        The step, and what was loaded; None when there is no checkpoint.

    Raises:
        SlotMambaError: there are checkpoints, but each of them is damaged.
    """
    group = group or Group()
    steps = group.on_main(lambda: claimed_steps(folder))
    for step in reversed(steps):
        try:
            return step, load(step)
        except DamagedCheckpointError as error:
            if group.is_main:
                logger.warning("checkpoint of step %d is skipped: %s", step, error)
    if steps:
        raise SlotMambaError(f"none of the {len(steps)} checkpoints in {folder} can be loaded")
    return None
