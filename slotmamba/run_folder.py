"""The folder of a run, which one world at a time may hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from slotmamba import run_lock
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
            lock = stack.enter_context((run_dir / run_lock.NAME).open("a"))
            if not run_lock.take(lock):
                failure = f"another process is training in {run_dir}: wait for it or set another run_dir"
        failure = world.broadcast(failure)
        if failure is not None:
            raise InputError(failure)
        yield
