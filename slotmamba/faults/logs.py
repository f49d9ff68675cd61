"""A log file for each rank; only rank 0 writes to the terminal."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from slotmamba.world import World


@contextmanager
def rank_log(logs: Path, world: World) -> Iterator[None]:
    """Keeps RUN_DIR/logs/rank-00000.log: what is logged, Python's warnings, and the traceback of an exception.

    Rank 0 shows warnings on the terminal too. Whatever other ranks write to standard output or standard error, native
    libraries included, goes to their log instead, from here to the end of the process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank-{world.rank:05d}.log"
    if not world.is_main:
        _redirect_output(path)
    with path.open("a", buffering=1) as log:
        process = f"process {os.getpid()} on {socket.gethostname()}"
        log.write(f"{datetime.now().isoformat(' ', 'seconds')} rank {world.rank} of {world.size}, {process}\n")
        with _logging_to(log, terminal=world.is_main):
            try:
                yield
            except BaseException:
                log.write(traceback.format_exc())
                raise


@contextmanager
def _logging_to(log: TextIO, terminal: bool) -> Iterator[None]:
    handlers: list[logging.Handler] = [logging.StreamHandler(log)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if terminal:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[1].setLevel(logging.WARNING)
    root, own = logging.getLogger(), logging.getLogger("slotmamba")
    level = own.level
    for handler in handlers:
        root.addHandler(handler)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        own.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)


def _redirect_output(path: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    for stream in (sys.stdout, sys.stderr):
        assert hasattr(stream, "reconfigure")
        stream.reconfigure(line_buffering=True)
