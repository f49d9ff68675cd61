"""The jobs that were submitted for a run: RUN_DIR/slurm/jobs.jsonl, one JSON object a line, in their order."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class SubmittedJob:
    job: str
    """Slurm's number of it; on this machine the number of the process."""
    cluster: Literal["slurm", "local"]
    submission: str
    """The folder beside jobs.jsonl, such as submission-001. The jobs of a chain have the same one."""
    time: float
    """Seconds since 1970."""


def note_job(run_dir: Path, job: str, cluster: Literal["slurm", "local"], submission: str) -> None:
    """Appends a job that has just been submitted."""
    with _file(run_dir).open("a") as file:
        file.write(json.dumps(asdict(SubmittedJob(job, cluster, submission, time.time()))) + "\n")


def submitted_jobs(run_dir: Path) -> list[SubmittedJob]:
    """All jobs of a run, whether they wait, run or have ended; none where it was never submitted."""
    try:
        lines = _file(run_dir).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [SubmittedJob(**json.loads(line)) for line in lines]


def rest_of_chain(run_dir: Path, job: str) -> list[str]:
    """The jobs that were submitted to go on after `job`."""
    jobs = submitted_jobs(run_dir)
    own = next((index for index, each in enumerate(jobs) if each.job == job), len(jobs))
    return [each.job for each in jobs[own + 1 :] if each.submission == jobs[own].submission]


def _file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "jobs.jsonl"
