"""What a cell of a sweep does when it has ended: it writes the results of the whole sweep anew.

So the last cell leaves the table of all, without a job of its own, which clusters of GPUs may not take.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SECONDS = 300


def write_sweep_results(folder: Path, job: str, failed: bool) -> None:
    """Says in one line where that fails; the cell, whose job is `job`, has ended as it has."""
    command = [sys.executable, "-m", "slotmamba.sweep_report", str(folder), job, "FAILED" if failed else "COMPLETED"]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the results of the sweep were not written within {SECONDS} seconds: {folder}", flush=True)
        return
    if done.returncode:
        print(f"the results of the sweep were not written: {folder}\n{done.stderr}", flush=True)
