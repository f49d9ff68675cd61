"""What a cell of a sweep does when it has ended: it writes the results of the whole sweep anew.

So the last cell leaves the table of all, without a job of its own, which clusters of GPUs may not take.
"""

from __future__ import annotations

import subprocess
import sys

from slotmamba_slurm.job import TrainJob

SECONDS = 300


def write_sweep_results(job: TrainJob) -> None:
    """Nothing for a run that is no cell. That it fails is said and changes nothing: the cell has ended as it has."""
    folder = job.sweep
    if folder is None:
        return
    command = [sys.executable, "-m", "slotmamba.sweep_report", str(folder)]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the results of the sweep were not written within {SECONDS} seconds: {folder}", flush=True)
        return
    if done.returncode:
        print(f"the results of the sweep were not written: {folder}\n{done.stderr}", flush=True)
