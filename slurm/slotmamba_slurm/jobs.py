"""What became of jobs: what the queue says, and what their tasks left behind. Needs neither submitit nor Slurm."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
from pathlib import Path

from slotmamba.errors import one_line

SECONDS = 60


def queued_jobs() -> dict[str, str] | None:
    """State, such as RUNNING, of each of the user's jobs in the queue, cells of arrays as `12_3`; None without Slurm.

    Raises:
        OSError: the controller does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i %T"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise OSError(None, f"squeue fails: {one_line(done.stderr)}")
    return dict(line.split() for line in done.stdout.splitlines())


def lives(job: str, host: str) -> bool:
    """Whether a job of cluster=local, which is a process, still runs on its host, as far as this one can tell."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(job), 0)
    except (ProcessLookupError, PermissionError):  # ended, and maybe its number is another user's now
        return False
    return True


def result(folder: Path, job: str) -> str | None:
    """`success` or `error`, as the tasks of a job say; None where they have not ended or were killed."""
    found = [pickle.loads(path.read_bytes())[0] for path in folder.glob(f"{job}_*_result.pkl")]
    return None if not found else "error" if "error" in found else "success"


def output(folder: Path, job: str) -> Path:
    """Where the first task of a job writes."""
    return folder / f"{job}_0_log.out"
