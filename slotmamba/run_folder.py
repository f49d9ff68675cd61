"""The folder of a run, which one world at a time may hold."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from slotmamba.errors import InputError
from slotmamba.world import World


@contextmanager
def locked(run_dir: Path, world: World) -> Iterator[None]:
    """Makes the run folder and holds it for this world: two that train in it would prune each other's checkpoints.

    Raises:
        InputError: another process holds it; in all processes of the world.
        OSError: it cannot be made or written.
    """
    with ExitStack() as stack:
        failure: str | None = None
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((run_dir / ".lock").open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                failure = f"another process is training in {run_dir}: wait for it or set another run_dir"
        failure = world.broadcast(failure)
        if failure is not None:
            raise InputError(failure)
        yield
