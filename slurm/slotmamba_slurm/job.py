"""What submitit pickles: which recipe to train.

Nothing in it says where to resume: that is the newest checkpoint of the run folder, every time the job starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slotmamba_slurm.stop import stop_file


@dataclass(frozen=True)
class TrainJob:
    """What the tasks of a job have to know."""

    recipe: Path
    """The file of the submission: RUN_DIR/slurm/submission-NNN/recipe.yaml."""
    cpus: int
    """Cores of each process."""
    processes: int
    """Ranks of the training, which are spread evenly over the nodes."""
    requeue: bool
    """Whether a job that was stopped, or whose training has failed, is to be queued again."""
    max_retries: int
    """How often in a row training that fails is tried again without a new checkpoint in between."""
    signal_lead: int
    """How many seconds before the end of its time Slurm tells it to save."""
    torchrun: bool = False
    """Whether, under Slurm, each node has one task, which starts the node's processes through torchrun."""
    sweep: Path | None = None
    """The folder of the sweep of which the run is a cell, if it is one."""

    @property
    def stop_file(self) -> Path:
        """Where it is, the job does not start again: `slotmamba runs stop` writes it."""
        return stop_file(self.recipe)

    @property
    def may_start_again(self) -> bool:
        return self.requeue and not self.stop_file.exists()

    @property
    def run_dir(self) -> Path:
        return self.recipe.parents[2]

    @property
    def submission(self) -> str:
        """The name of the submission's folder."""
        return self.recipe.parent.name

    @property
    def training(self) -> list[str]:
        """Arguments of Python."""
        return ["-m", "slotmamba.cli", "train", str(self.recipe)]

    def __call__(self) -> None:
        """submitit pickles only what can be called."""
        raise AssertionError("the tasks of a job run slotmamba_slurm.task")
