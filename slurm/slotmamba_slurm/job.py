"""What submitit pickles: which recipe to train.

Nothing in it says where to resume: that is the newest checkpoint of the run folder, every time the job starts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from slotmamba_slurm.stop import stop_file


@dataclass(frozen=True)
class TrainJob:
    """recipe: the file of the submission; cpus: cores of each task; requeue: whether a job that was stopped is to be
    queued again; sweep: the folder of the sweep of which the job is a cell, if it is one."""

    recipe: Path
    cpus: int
    requeue: bool
    sweep: Path | None = None

    @property
    def stop_file(self) -> Path:
        """Where it is, the job does not start again: `slotmamba runs stop` writes it."""
        return stop_file(self.recipe)

    def command(self) -> list[str]:
        return [sys.executable, "-u", "-m", "slotmamba.cli", "train", str(self.recipe)]

    def __call__(self) -> None:
        """submitit pickles only what can be called."""
        raise AssertionError("the tasks of a job run slotmamba_slurm.task")
