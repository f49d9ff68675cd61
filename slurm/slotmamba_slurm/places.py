"""Where a task runs: which process of which job it is and where the processes meet."""

from __future__ import annotations

import os
import sys
import tempfile
from abc import abstractmethod
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.local.local import LocalJobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from slotmamba_slurm.job import TrainJob

FIRST_PORT, PORTS = 20_000, 10_000
OF_A_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def of_a_world(name: str) -> bool:
    """Whether processes find their world by the variable: that of the shell that submitted is not the job's."""
    return name in OF_A_WORLD or name.startswith("TORCHELASTIC_")


class Place(JobEnvironment):
    """submitit's description of a task, and what it lacks."""

    @property
    @abstractmethod
    def main_host(self) -> str:
        """The host of rank 0."""

    @property
    def rendezvous(self) -> str:
        return f"{self.main_host}:{self.main_port}"

    @property
    def main_port(self) -> int:
        """Jobs that share a host have different numbers, and so, nearly always, different ports."""
        return FIRST_PORT + int(self.raw_job_id) % PORTS

    def command(self, job: TrainJob) -> list[str]:
        """What the task runs."""
        return [sys.executable, "-u", *job.training]

    def variables(self, job: TrainJob) -> dict[str, str]:
        """What `slotmamba train` needs to know beside its recipe."""
        found = self._settings(job)
        if self.num_tasks > 1:
            found |= {
                "RANK": str(self.global_rank),
                "WORLD_SIZE": str(self.num_tasks),
                "LOCAL_RANK": str(self.local_rank),
                "MASTER_ADDR": self.main_host,
                "MASTER_PORT": str(self.main_port),
            }
        return found

    def _settings(self, job: TrainJob) -> dict[str, str]:
        """Those that have nothing to do with other processes."""
        # Triton's cache is for local disks: processes on several hosts that share one fail each other's builds.
        cache = Path(tempfile.gettempdir()) / f"slotmamba-{os.getuid()}" / f"triton-{self.job_id}-{self.local_rank}"
        found = {"TRITON_CACHE_DIR": str(cache)}
        if "OMP_NUM_THREADS" not in os.environ:
            found["OMP_NUM_THREADS"] = str(job.cpus)
        return found


class SlurmPlace(Place, SlurmJobEnvironment):
    @property
    def main_host(self) -> str:
        # Not what submitit says without the variable: this host, which would be wrong on all nodes but one.
        assert os.environ.get("SLURM_JOB_NODELIST"), "Slurm has not set SLURM_JOB_NODELIST"
        return str(self.hostnames[0])

    def command(self, job: TrainJob) -> list[str]:
        if not job.torchrun:
            return super().command(job)
        on_each = job.processes // self.num_tasks
        where = [f"--nnodes={self.num_tasks}", f"--node-rank={self.global_rank}", f"--nproc-per-node={on_each}"]
        where += ["--rdzv-backend=static", f"--master-addr={self.main_host}", f"--master-port={self.main_port}"]
        return [sys.executable, "-u", "-m", "slotmamba_slurm.torchrun", *where, *job.training]

    def variables(self, job: TrainJob) -> dict[str, str]:
        """torchrun sets the others."""
        return self._settings(job) if job.torchrun else super().variables(job)


class LocalPlace(Place, LocalJobEnvironment):
    @property
    def main_host(self) -> str:
        return "127.0.0.1"
