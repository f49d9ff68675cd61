"""torchrun on a node, ``python -m slotmamba_slurm.torchrun ARGUMENTS``, that leaves stopping to the training processes.

At SIGTERM and SIGINT torchrun gives them thirty seconds and kills them, and SIGUSR2 ends torchrun alone. Here it
survives all three and sees to it that every process which it has started is told once: Slurm signals all processes of a
job by itself, but not those that start later, or are not yet prepared for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STOPS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.2


def main(arguments: list[str]) -> None:
    stops = _Stops()
    threading.Thread(target=_tell, args=(stops,), daemon=True).start()
    from torch.distributed.run import main as torchrun  # seconds, in which a signal should count

    torchrun(["--signals-to-handle=SIGHUP,SIGQUIT", *arguments])


class _Stops:
    """Whether one of `STOPS` has come. No event of `threading`: a handler that interrupts itself would wait for its own
    lock, and Slurm does send two signals at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in STOPS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _tell(stops: _Stops) -> None:
    """Once it is asked to stop, sends each child SIGUSR2 as soon as that has a handler for it. Once only: a second one,
    that came when the child has saved and is about to end, would kill it."""
    told: set[int] = set()
    task = os.getppid()
    while True:
        if os.getppid() != task:  # it was killed: saving now would look to the others as if training had finished
            for child in _children():
                os.kill(child, signal.SIGKILL)
            os._exit(1)
        for child in _children() if stops.asked else ():
            if child not in told and _catches(child, signal.SIGUSR2):
                told.add(child)
                os.kill(child, signal.SIGUSR2)
        time.sleep(POLL_SECONDS)


def _children() -> Iterator[int]:
    """Numbers of the processes that this one has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid():
            yield int(folder.name)


def _catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; False too for one that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


if __name__ == "__main__":
    main(sys.argv[1:])
