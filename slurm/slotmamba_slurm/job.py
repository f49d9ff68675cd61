"""What submitit pickles: which recipe to train.

Nothing in it says where to resume: that is the newest checkpoint of the run folder, every time the job starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainJob:
    """recipe: the file of the submission; cpus: cores of each process; requeue: whether a job that was stopped is to be
    queued again; torchrun: processes that a task starts through torchrun; None: training is the task's only process."""

    recipe: Path
    cpus: int
    requeue: bool
    torchrun: int | None = None

    @property
    def training(self) -> list[str]:
        """Arguments of Python."""
        return ["-m", "slotmamba.cli", "train", str(self.recipe)]

    def __call__(self) -> None:
        """submitit pickles only what can be called."""
        raise AssertionError("the tasks of a job run slotmamba_slurm.task")
