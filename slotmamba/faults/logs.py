"""A log file for each rank; only rank 0 writes to the terminal."""

from __future__ import annotations

import io
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

from slotmamba.errors import one_line
from slotmamba.outcome import outcome
from slotmamba.world import World


class _RankLog(logging.StreamHandler[TextIO]):
    """Writes through to the file, and goes on where that fails: a full disk is for the checkpoints to report."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.TextIOWrapper(path.open("ab", buffering=0), write_through=True))
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def write(self, level: int, message: str, error: BaseException | None = None) -> None:
        """A line, and the traceback of `error`, for the file only."""
        trace = (type(error), error, error.__traceback__) if error else None
        self.handle(logging.LogRecord(__name__, level, __file__, 0, message, (), trace))


@contextmanager
def rank_log(logs: Path, world: World) -> Iterator[None]:
    """Keeps RUN_DIR/logs/rank-00000.log: what is logged, Python's warnings, and how the process ends, with the
    traceback of an exception.

    Rank 0 shows warnings on the terminal too. Whatever other ranks write to standard output or standard error, native
    libraries included, goes to their log instead, from here to the end of the process.
    """
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank-{world.rank:05d}.log"
    if not world.is_main:
        _redirect_output(path)
    with closing(_RankLog(path)) as log, closing(log.stream):
        log.write(logging.INFO, f"rank {world.rank} of {world.size}: process {os.getpid()} on {socket.gethostname()}")
        handlers: list[logging.Handler] = [log]
        if world.is_main:
            handlers.append(logging.StreamHandler(sys.stderr))
            handlers[1].setLevel(logging.WARNING)
        with _logging_to(handlers):
            try:
                yield
            except BaseException as error:
                known = outcome(error)
                text = one_line(known.message if known else f"{type(error).__name__}: {error}")
                log.write(logging.ERROR, f"the process fails: {text}", error)
                raise
            log.write(logging.INFO, "the process ends")


@contextmanager
def _logging_to(handlers: list[logging.Handler]) -> Iterator[None]:
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
