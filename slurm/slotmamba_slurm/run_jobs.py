"""The jobs of a run, by what submitting leaves in its folder."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from pathlib import Path

from slotmamba.errors import InputError
from slotmamba_slurm.jobs import submitted_jobs
from slotmamba_slurm.queue import ask_squeue
from slotmamba_slurm.stop import live_controllers


@dataclass(frozen=True)
class RunJobs:
    """folder: of the files of the jobs; slurm: ids of those on Slurm; local: process numbers of submitit's controllers
    for cluster=local, on the hosts where it was submitted; both in the order of their submission; recipes: what was
    submitted."""

    folder: Path
    slurm: list[str]
    local: list[int]
    recipes: list[Path]

    def local_state(self) -> str | None:
        """The state of the last one for cluster=local, in Slurm's words; None where it is unknown: there is none, it
        has ended without a result, or runs on another host."""
        if not self.local:
            return None
        return self.result(str(self.local[-1])) or (
            "RUNNING" if live_controllers(self.folder, self.local[-1:]) else None
        )

    def result(self, number: str) -> str | None:
        """How a job has ended, in Slurm's words, by what its tasks left; None: it has not, or they were killed."""
        paths = [
            path for path in self.folder.glob(f"{number}_*_result.pkl") if path.is_file()
        ]  # links may lead nowhere
        words = {_first_word(path) for path in paths}
        return "FAILED" if "error" in words else "COMPLETED" if "success" in words else None


def _first_word(result: Path) -> str | None:
    """Of the pickle of ("success", ...) or ("error", ...) that a task left. It is never loaded, which would run what
    whoever can write into the folder has put there."""
    with result.open("rb") as file:
        start = file.read(256)
    try:
        return next((word for _, word, _ in pickletools.genops(start) if isinstance(word, str)), None)
    except ValueError:
        return None


def run_jobs(run_dir: Path) -> RunJobs:
    folder = run_dir / "slurm"
    jobs = submitted_jobs(run_dir)
    slurm = [each.job for each in jobs if each.cluster == "slurm"]
    local = [int(each.job) for each in jobs if each.cluster == "local"]
    return RunJobs(folder, slurm, local, list(folder.glob("submission-*/recipe.yaml")))


def check_none_under_way(run_dir: Path) -> None:
    """Two jobs of a run would train in the same folder, which the second one finds locked.

    Raises:
        InputError: a job of the run waits or runs on Slurm, or Slurm does not say whether one does.
    """
    own = run_jobs(run_dir)
    queue = ask_squeue(own.slurm)
    if queue.problems:
        raise InputError(f"{queue.problems[0]}: whether jobs of this run are queued already is not known")
    for job in queue.jobs.values():
        # Slurm says for a while that a job runs whose tasks have left their results.
        if not job.ended and (job.state == "PENDING" or own.result(job.id) is None):
            stop = f"`slotmamba runs stop {run_dir}`"
            raise InputError(f"job {job.id} of this run is in the queue already ({job.state}): {stop} ends it")
