"""Runs with what their jobs and Slurm say of them. As a part of the command line it knows all packages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slotmamba.runs.folder import RunFolder
from slotmamba.runs.starts import FAILED, End, Start
from slotmamba.runs.status import Job
from slotmamba_slurm import history
from slotmamba_slurm.queue import Queue, QueuedJob, ask_sacct, ask_squeue
from slotmamba_slurm.run_jobs import RunJobs, run_jobs


def open_run(path: Path, last_bytes: int | None = None) -> RunFolder:
    """The folder of a run, with the history of its jobs but for those that another job kept from training."""
    starts = [each for each in history.read_history(path) if each.reason != history.LOCKED_OUT]
    return RunFolder(path, [_start(each) for each in starts], last_bytes)


def _start(job: history.Start) -> Start:
    reason = job.reason or job.signal
    end = End(job.ended or FAILED, reason) if reason else None
    return Start(job.time, job.processes, job.nodes, job.resumed_from or 0, end=end, job=job.job)


@dataclass(frozen=True)
class LastJobs:
    """For each run that has known jobs, by its folder: the one that is under way, or waits, or else was the last.

    problems: a line for each question that Slurm did not answer.
    """

    jobs: dict[Path, Job]
    problems: list[str]


def last_jobs(folders: Sequence[RunFolder]) -> LastJobs:
    """Asks Slurm once for the jobs of all runs, and once more for those that have left the queue."""
    of_runs = {run.path: run_jobs(run.path) for run in folders}
    ids = {path: _not_locked_out(path, own.slurm) for path, own in of_runs.items()}
    queue = ask_squeue([each for own in ids.values() for each in own])
    forgotten = [own[-1] for own in ids.values() if own and not any(each in queue.jobs for each in own)]
    accounts = Queue() if queue.problems else ask_sacct(forgotten)
    found = queue.jobs | accounts.jobs
    local = {path: state for path, own in of_runs.items() if (state := own.local_state()) is not None}
    jobs = {path: Job(str(of_runs[path].local[-1]), state) for path, state in local.items()}
    for path, own in ids.items():
        known = [_ended(as_job(found[each]), of_runs[path]) for each in own if each in found]
        if known:
            jobs[path] = max(known, key=lambda job: (job.runs, job.waits, own.index(job.id)))
    return LastJobs(jobs, queue.problems + accounts.problems)


def _not_locked_out(path: Path, ids: list[str]) -> list[str]:
    """Without jobs that ended because another one trains: the state of the run is that one's."""
    reasons = {start.job: start.reason for start in history.read_history(path)}  # of the last start of each
    return [each for each in ids if reasons.get(each) != history.LOCKED_OUT]


def _ended(job: Job, own: RunJobs) -> Job:
    """Slurm says for a while that a job runs whose tasks have left their results."""
    result = own.result(job.id) if job.runs else None
    return job if result is None else replace(job, state=result)


def as_job(queued: QueuedJob) -> Job:
    return Job(queued.id, queued.state, queued.reason, queued.nodes, queued.began)
