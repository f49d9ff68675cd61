"""submitit's executors with a program of our own for the tasks.

submitit's counts a signal in the last fifth of the wall time as a time-out and gives up after three, does nothing at
SIGTERM, which is all that many clusters send at preemption, and starts whatever the pickle says again.
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from submitit.core.core import Job, R
from submitit.core.utils import DelayedSubmission
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor

from slotmamba_slurm.stop import cancel


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

    _numbers: tuple[str, ...] = ()

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Job[Any]]:
        """Cancels what sbatch has taken when files cannot be written afterwards."""
        self._numbers = ()
        try:
            with redirect_stderr(io.StringIO()):  # what sbatch says is in the error too
                return super()._internal_process_submissions(delayed_submissions)
        except BaseException:
            cancel(self._numbers)
            raise

    def _get_job_id_from_submission_command(self, string: str | bytes) -> str:  # type: ignore[override]
        number = super()._get_job_id_from_submission_command(string)
        self._numbers = (*self._numbers, number)
        return number

    def script(self) -> str:
        """The batch script of a submission."""
        return self._make_submission_file_text(self._submitit_command_str, "")


class LocalTasks(_OwnTasks, LocalExecutor):
    """Runs `slotmamba_slurm.task` in processes on this machine, which `slotmamba_slurm.controller` starts."""

    def _submit_command(self, command: str) -> LocalJob[R]:
        parameters = self.parameters
        variables = {
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_NTASKS": str(parameters["tasks_per_node"]),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(parameters["signal_delay_s"]),
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * parameters["timeout_min"])),
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(parameters["gpus_per_node"]))),
        }
        controller = [sys.executable, "-m", "slotmamba_slurm.controller", str(self.folder)]
        process = subprocess.Popen(controller, env=os.environ | variables)
        tasks = list(range(parameters["tasks_per_node"]))
        return LocalJob(self.folder, job_id=str(process.pid), process=process, tasks=tasks)
