"""The lock of a run folder, RUN_DIR/.lock: whoever trains there holds it, and it goes with the process."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

NAME = ".lock"
TRIES, PAUSE = 5, 0.1


def take(lock: IO[str]) -> bool:
    """Whether the open lock file is ours from here on, until it is closed.

    Those who look whether it is held, as `slotmamba runs` does, hold it themselves for a moment, so once is not enough.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return True
    return False


def is_held(run_dir: Path) -> bool:
    """Whether a process trains in `run_dir`, as far as this host knows: not every file system shares locks among hosts.

    Raises:
        OSError: the lock file cannot be opened.
    """
    try:
        descriptor = os.open(run_dir / NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
