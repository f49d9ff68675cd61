"""``python -m slotmamba_slurm.controller FOLDER``: the process that starts the tasks of a job on this machine.

submitit's, except that it starts them as often as rank 0's asks for that: what ends a job is decided in one place,
where `slurm.max_retries` is looked at, and not here after five times.
"""

from __future__ import annotations

import sys
from pathlib import Path

from submitit.local.local import Controller

if __name__ == "__main__":
    Controller(Path(sys.argv[1])).run(max_retry=sys.maxsize)
