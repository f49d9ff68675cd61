"""submitit's executors with a program of our own for the tasks.

submitit's counts a signal in the last fifth of the wall time as a time-out and gives up after three, does nothing at
SIGTERM, which is all that many clusters send at preemption, and starts whatever the pickle says again.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor


class _OwnTasks:
    """What both executors run in a job's tasks."""

    code: Path
    folder: Path
    python: str  # quoted for a shell

    @property
    def _submitit_command_str(self) -> str:
        # Before Python starts, so that the task is the submitted code too. env: without a shell there are no
        # assignments.
        path = os.pathsep.join([str(self.code), *filter(None, [os.environ.get("PYTHONPATH")])])
        task = shlex.join(["-u", "-m", "slotmamba_slurm.task", str(self.folder)])
        return f"{shlex.join(['env', f'PYTHONPATH={path}'])} {self.python} {task}"


class SlurmTasks(_OwnTasks, SlurmExecutor):
    """Runs `slotmamba_slurm.task` in the tasks of a Slurm job."""

    def script(self) -> str:
        """The batch script of a submission."""
        return self._make_submission_file_text(self._submitit_command_str, "")


class LocalTasks(_OwnTasks, LocalExecutor):
    """Runs `slotmamba_slurm.task` in processes on this machine."""
