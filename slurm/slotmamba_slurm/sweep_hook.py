"""What a cell of a sweep does when it has ended: it writes the results of the whole sweep anew.

So the last cell leaves the table of all, without a job of its own, which clusters of GPUs may not take.
"""

from __future__ import annotations

import subprocess
import sys

from slotmamba_slurm.job import TrainJob

SECONDS = 300


def write_sweep_results(job: TrainJob, number: str, state: str) -> None:
    """Nothing for a run that is no cell. Where it fails that is said and changes nothing: the cell has ended as it has.

    Args:
        job: of the cell.
        number: Slurm's of the job.
        state: in which Slurm will find it ended.
    """
    folder = job.sweep
    if folder is None:
        return
    command = [sys.executable, "-m", "slotmamba.sweep_report", str(folder), number, state]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the results of the sweep were not written within {SECONDS} seconds: {folder}", flush=True)
        return
    if done.returncode:
        print(f"the results of the sweep were not written: {folder}\n{done.stderr}", flush=True)
