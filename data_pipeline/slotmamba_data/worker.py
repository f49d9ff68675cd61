"""A process that answers requests, and ends with the one that started it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

_NOT_FOR_WORKERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}

Handler = Callable[[Any], Iterable[Any]]
"""Answers one request with one message or several, the last of which says that it is the last by what it is."""


class Worker:
    """A worker process.

    It is started anew and not forked: a copy of a process with threads, locks and a GPU may not work.

    Args:
        name: of the worker in errors.
        make_handler: makes its handler, in the worker; can be pickled, and so can requests and messages. Where it
            fails its error answers every request.
    """

    def __init__(self, name: str, make_handler: Callable[[], Handler]) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Unpickled by `_serve`, so that an error there is answered like any other.
        pickled = bytes(ForkingPickler.dumps(make_handler))
        self._process = context.Process(target=_serve, args=(theirs, pickled), name=name, daemon=True)
        # A new process inherits what is blocked. Ctrl-C and a cluster's signals reach all processes of a run, and are
        # for the parent alone: it may want to finish a step, which takes its workers.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        theirs.close()

    def send(self, request: Any) -> None:
        """Hand over a request; they are answered in order.

        Raises:
            ChildProcessError: the worker is dead.
        """
        try:
            self.connection.send(request)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        """The next message, as soon as there is one.

        Raises:
            ChildProcessError: the worker died.
            Exception: what the handler raised, with the worker's traceback as a note.
        """
        try:
            failed, message = _receive(self.connection)
        except (EOFError, OSError) as error:
            raise self._died() from error
        if failed:
            raise message
        return message

    def _died(self) -> ChildProcessError:
        self._process.join(5)
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"
        return ChildProcessError(f"{self._name} {how}; is there enough memory?")

    def close(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, make_handler: bytes) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        handler = pickle.loads(make_handler)()
    except Exception as error:
        handler = functools.partial(_fail, error)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            request = connection.recv()
            try:
                for message in handler(request):
                    _send(connection, (False, message))
            except Exception as error:
                _send(connection, (True, _portable(error)))


def _end_with_parent() -> None:
    """End this process, whatever it does, as soon as its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _send(connection: Connection, message: Any) -> None:
    """Send a message; the numbers of its arrays are not copied into the pickle and out of it again."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    connection.send((pickled, [len(view) for view in views]))
    if views:
        connection.send_bytes(b"".join(views))


def _receive(connection: Connection) -> Any:
    """The message; its arrays are read-only."""
    pickled, sizes = connection.recv()
    content = memoryview(connection.recv_bytes() if sizes else b"")
    ends = list(itertools.accumulate(sizes))
    return pickle.loads(pickled, buffers=[content[end - size : end] for end, size in zip(ends, sizes, strict=True)])


def _fail(error: Exception, request: Any) -> Iterable[Any]:
    raise error


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or a stand-in where it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        ForkingPickler.dumps(error)
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker process:\n{trace}")
    return error
