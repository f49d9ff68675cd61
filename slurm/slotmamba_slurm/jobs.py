"""The jobs that were submitted for a run: RUN_DIR/slurm/jobs.jsonl, one JSON object a line, in their order."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from slotmamba_slurm.records import append_record, take_records


@dataclass(frozen=True)
class SubmittedJob:
    job: str
    """Slurm's number of it; on this machine the number of the process."""
    cluster: Literal["slurm", "local"]
    submission: str
    """The folder beside jobs.jsonl, such as submission-001. The jobs of a chain have the same one."""
    time: float
    """Seconds since 1970."""


_JOB = TypeAdapter(SubmittedJob)
_NUMBERS = {"slurm": r"[0-9]+(_[0-9]+)?", "local": r"[0-9]+"}


def note_job(run_dir: Path, job: str, cluster: Literal["slurm", "local"], submission: str) -> None:
    """Appends a job that has just been submitted."""
    append_record(_file(run_dir), asdict(SubmittedJob(job, cluster, submission, time.time())))


def submitted_jobs(run_dir: Path) -> list[SubmittedJob]:
    """All jobs of a run, whether they wait, run or have ended; none where it was never submitted. A note says if lines
    are damaged, which are left out."""
    jobs: list[SubmittedJob] = []

    def take(line: bytes) -> None:
        job = _JOB.validate_json(line)
        if not re.fullmatch(_NUMBERS[job.cluster], job.job):
            raise ValueError(f"{job.job!r} is no job")
        jobs.append(job)

    take_records(_file(run_dir), take)
    return jobs


def rest_of_chain(run_dir: Path, job: str) -> list[str]:
    """The jobs that were submitted to go on after `job`."""
    jobs = submitted_jobs(run_dir)
    own = next((index for index, each in enumerate(jobs) if each.job == job), len(jobs))
    return [each.job for each in jobs[own + 1 :] if each.submission == jobs[own].submission]


def _file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "jobs.jsonl"
