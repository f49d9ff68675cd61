"""Where a task runs: which process of which job it is, where the processes meet, and how the job is queued again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from abc import abstractmethod
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, LocalJobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

FIRST_PORT, PORTS = 20_000, 10_000
SCONTROL_SECONDS = 60


class Place(JobEnvironment):
    """submitit's description of a task, and what it lacks."""

    @property
    @abstractmethod
    def main_host(self) -> str:
        """The host of rank 0."""

    @abstractmethod
    def end_stopped(self, requeue: bool) -> int:
        """Has the job queued again if it should be, and returns the task's exit code."""

    @property
    def rendezvous(self) -> str:
        return f"{self.main_host}:{self.main_port}"

    @property
    def main_port(self) -> int:
        """Jobs that share a host have different numbers, and so, nearly always, different ports."""
        return FIRST_PORT + int(self.raw_job_id) % PORTS

    def variables(self, cpus: int) -> dict[str, str]:
        """What `slotmamba train` needs to know beside its recipe."""
        # Triton's cache is for local disks: processes on several hosts that share one fail each other's builds.
        cache = Path(tempfile.gettempdir()) / f"slotmamba-{os.getuid()}" / f"triton-{self.job_id}-{self.local_rank}"
        found = {"TRITON_CACHE_DIR": str(cache)}
        if "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(cpus)
        if self.num_tasks > 1:
            found |= {
                "RANK": str(self.global_rank),
                "WORLD_SIZE": str(self.num_tasks),
                "LOCAL_RANK": str(self.local_rank),
                "MASTER_ADDR": self.main_host,
                "MASTER_PORT": str(self.main_port),
            }
        return found


class SlurmPlace(Place, SlurmJobEnvironment):
    @property
    def main_host(self) -> str:
        # Not what submitit says without the variable: this host, which would be wrong on all nodes but one.
        assert os.environ.get("SLURM_JOB_NODELIST"), "Slurm has not set SLURM_JOB_NODELIST"
        return str(self.hostnames[0])

    def end_stopped(self, requeue: bool) -> int:
        if self.global_rank != 0:
            return 0
        job = self._scontrol("show", "job")
        state = _value(job, "JobState")
        if state != "RUNNING":  # Slurm is about to queue it again, or it was cancelled
            print(f"job {self.job_id} is {state}: Slurm decides what becomes of it", flush=True)
        elif requeue and _value(job, "Requeue") == "1":
            self._scontrol("requeue")
            print(f"job {self.job_id} is queued again", flush=True)
        else:
            print(f"job {self.job_id} is not queued again, as was asked; submit it again to resume", flush=True)
        return 0

    def _scontrol(self, *command: str) -> str:
        """Runs a command of scontrol on this job."""
        done = subprocess.run(
            ["scontrol", *command, self.job_id],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
            preexec_fn=_outlive_the_step,
        )
        if done.returncode:
            raise RuntimeError(f"scontrol {' '.join(command)} {self.job_id}: {done.stderr.strip()}")
        return done.stdout


class LocalPlace(Place, LocalJobEnvironment):
    @property
    def main_host(self) -> str:
        return "127.0.0.1"

    def end_stopped(self, requeue: bool) -> int:
        """The exit code tells submitit's controller to start all tasks again, which it does five times."""
        return LOCAL_REQUEUE_RETURN_CODE if requeue else 0


def _value(job: str, name: str) -> str:
    """A value in what `scontrol show job` says."""
    found = re.search(rf"\b{name}=(\S+)", job)
    assert found, job
    return found[1]


def _outlive_the_step() -> None:
    """The SIGTERM that a requeue sends to every process of the step would end the scontrol that asked for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
