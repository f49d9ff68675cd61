"""What a process leaves behind when the job has failed: Python stacks and the record of its collectives."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path
from typing import IO

LAST_RESORT = 60.0  # seconds after which a process that cannot even end itself is ended without Python's help


class Recorder:
    """RUN_DIR/logs/stacks-00000.txt, empty unless something happens, and flight-recorder-0 beside it.

    While it is open, a crash in native code (SIGSEGV, SIGABRT and so on) leaves the stacks of all threads.
    """

    def __init__(self, logs: Path, rank: int) -> None:
        self._flight = logs / f"flight-recorder-{rank}"
        self._flight.unlink(missing_ok=True)
        self._stacks: IO[str] = (logs / f"stacks-{rank:05d}.txt").open("w")
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(self._stacks)

    def end_after(self, seconds: float) -> None:
        """Unless this is called again within `seconds`, the stacks are written and the process exits with 1.

        A thread of the C library does it: also where no Python code can run any more.
        """
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def dump(self, headline: str) -> None:
        """Writes the stacks of all threads now, and the last collectives where torch has recorded them."""
        self._stacks.write(f"{headline}\n\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        record = _flight_record()
        if record:
            self._flight.write_bytes(record)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        if self._was_enabled:
            faulthandler.enable(sys.__stderr__ or 2)
        self._stacks.close()


def keep_flight_record(logs: Path) -> None:
    """Makes torch record its last collectives, by variables that it reads when the process group is made.

    `torch.distributed.flight_recorder.fr_trace` (the command torchfrtrace) reads the files.
    """
    if "WORLD_SIZE" not in os.environ:  # a process that trains alone has no collectives
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # 2.13 and 2.11
        os.environ.setdefault(name, f"{logs.resolve()}/flight-recorder-")


def _flight_record() -> bytes:
    """The record of NCCL's collectives, or of gloo's; empty where this build of torch keeps none."""
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_nccl_trace", None) or getattr(_distributed_c10d, "_dump_fr_trace", None)
    return dump() if dump else b""


def collectives_begun() -> int | None:
    """How many collectives this process has begun, in all groups; None where torch does not record them.

    Ranks make the same ones, so of ranks that hang the one with the fewest is the one that the others wait for.
    """
    record = _flight_record()
    if not record:
        return None
    return sum(group["last_enqueued_collective"] for group in pickle.loads(record)["pg_status"].values())


def set_collective_timeout(seconds: float) -> None:
    """Sets the timeout of collectives, gloo's and NCCL's, that begin from now on, in all process groups."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
