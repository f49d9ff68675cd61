"""submitit's executors with a program of our own for the tasks.

submitit's counts a signal in the last fifth of the wall time as a time-out and gives up after three, does nothing at
SIGTERM, which is all that many clusters send at preemption, and starts whatever the pickle says again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit.core.core import Job, R
from submitit.core.utils import DelayedSubmission
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from slotmamba.errors import one_line
from slotmamba_slurm.slurm_job import SlurmError
from slotmamba_slurm.stop import cancel

# Options of sbatch's that come from variables, which count more than those of a script. These say what recipes may not.
OF_THE_SITE = ("ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT", "WCKEY")


class _OwnTasks:
    """What both executors run in a job's tasks."""

    code: Path
    folder: Path
    python: str  # quoted for a shell

    def __init__(self, folder: Path, written: list[Path] | None = None, **options: Any) -> None:
        """`written`: to which the files of jobs are added before they are there; the job's own are not."""
        super().__init__(folder, **options)  # type: ignore[call-arg]  # of the executor that this is mixed into
        self._written = [] if written is None else written

    def _write_pickle(self, delayed: DelayedSubmission) -> Path:
        path = self._new(Path(self.folder) / f"{uuid.uuid4().hex}.pkl")
        delayed.dump(path)
        return path

    def _rename(self, path: Path, target: Path) -> None:
        path.rename(self._new(target))

    def _new(self, path: Path) -> Path:
        self._written.append(path)
        return path

    @property
    def _submitit_command_str(self) -> str:
        # Before Python starts, so that the task is the submitted code too. env: without a shell there are no
        # assignments.
        path = os.pathsep.join([str(self.code), *filter(None, [os.environ.get("PYTHONPATH")])])
        task = shlex.join(["-u", "-m", "slotmamba_slurm.task", str(self.folder)])
        return f"{shlex.join(['env', f'PYTHONPATH={path}'])} {self.python} {task}"


class SlurmTasks(_OwnTasks, SlurmExecutor):
    """Runs `slotmamba_slurm.task` in the tasks of a Slurm job."""

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Job[Any]]:
        """Cancels what sbatch has taken when files cannot be written afterwards.

        Raises:
            SlurmError: sbatch fails.
        """
        count = len(delayed_submissions)
        if count > 1:
            self.parameters["map_count"] = count
        pickles = [self._write_pickle(delayed) for delayed in delayed_submissions]
        script = self._new(Path(self.folder) / f".submission_file_{uuid.uuid4().hex}.sh")
        script.write_text(self.script())
        number = self._get_job_id_from_submission_command(self.sbatch(str(script)).stdout)
        try:
            ids = [f"{number}_{index}" for index in range(count)] if count > 1 else [number]
            jobs: list[Job[Any]] = [SlurmJob(self.folder, each, list(range(self._num_tasks()))) for each in ids]
            self._rename(script, jobs[0].paths.submission_file)
            script.symlink_to(jobs[0].paths.submission_file)  # the name that Slurm knows
            for job, pickle in zip(jobs, pickles, strict=True):
                self._rename(pickle, job.paths.submitted_pickle)
        except BaseException:
            cancel([number])
            raise
        return jobs

    def sbatch(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """
        Raises:
            SlurmError: it fails; the text is what it says.
        """
        done = subprocess.run(
            ["sbatch", *arguments],
            env=_without_options(os.environ, self.parameters),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            start_new_session=True,  # Ctrl-C would end it when the job is in the queue, but its number is not known
        )
        if done.returncode:
            raise SlurmError(one_line(done.stderr))
        return done

    def script(self) -> str:
        """The batch script of a submission."""
        return self._make_submission_file_text(self._submitit_command_str, "")


class LocalTasks(_OwnTasks, LocalExecutor):
    """Runs `slotmamba_slurm.task` in processes on this machine, which `slotmamba_slurm.controller` starts."""

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Job[Any]]:
        (delayed,) = delayed_submissions
        pickle = self._write_pickle(delayed)
        job: LocalJob[Any] = self._submit_command(self._submitit_command_str)
        self._rename(pickle, job.paths.submitted_pickle)
        return [job]

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


def _without_options(variables: Mapping[str, str], parameters: Mapping[str, Any]) -> dict[str, str]:
    """The environment of an sbatch that asks for `parameters`, whatever the shell was set up for."""

    def stays(name: str) -> bool:
        option = name.removeprefix("SBATCH_")
        if option == name:
            return name != "SLURM_EXPORT_ENV"
        return option in OF_THE_SITE and parameters.get(option.lower()) is None

    return {name: value for name, value in variables.items() if stays(name)}
