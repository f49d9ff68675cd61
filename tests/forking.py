"""Processes forked from a server that has imported everything already, which saves seconds for each.

The server is a module that ends in `serve`. It reads a request a line, a JSON array, and answers each with a line:

    ["start", STDOUT, STDERR, ARGUMENT, ...]    the number of a new process, with its output in these files
    ["poll", PID]                               its exit code, or null while it runs; minus the signal that ended it
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Command:
    """A process and the files of its output."""

    def __init__(self, pid: int, poll: Callable[[], int | None], output: Path) -> None:
        self.pid = pid
        self._poll = poll
        self._output = output
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        if self.code is None:
            self.code = self._poll()
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def wait_until(self, happened: Callable[[], object]) -> bool:
        """Returns once something has happened, or False once the process has ended without it."""
        while not happened():
            if self.poll() is not None:
                return bool(happened())
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended gets none."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return self._output.read_text()

    @property
    def err(self) -> str:
        return self._output.with_suffix(".err").read_text()


class Server:
    """Runs a server's module. Its processes have their output in files of `folder`."""

    def __init__(self, module: str, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, *arguments: object) -> Command:
        output = self.output()
        pid = self._request("start", output, output.with_suffix(".err"), *arguments)
        return Command(pid, partial(self._request, "poll", pid), output)

    def output(self) -> Path:
        """A new empty file for standard output; with the suffix .err another for standard error."""
        output = self._folder / f"{next(self._numbers)}.out"
        output.touch()
        output.with_suffix(".err").touch()
        return output

    def close(self) -> None:
        self._process.communicate()

    def _request(self, *request: object) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve(start: Callable[..., int]) -> None:
    """Answers requests until there are no more."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps({"start": start, "poll": _poll}[name](*arguments)), flush=True)


def forked(stdout: str, stderr: str, run: Callable[[], int]) -> int:
    """The number of a new process that exits with what `run` returns, 1 if it raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for path, descriptor in ((stdout, 1), (stderr, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        code = run()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None
