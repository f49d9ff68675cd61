"""Runs `slotmamba` commands, each in a process of its own, forked from this one that has imported everything already.

Run as a script it reads a request a line, a JSON array, and answers each with a line:

    ["start", [ARGUMENT, ...], STDOUT, STDERR]    the new process's number
    ["poll", PID]                                 its exit code, or null while it runs; minus the signal that ended it
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import matplotlib.figure  # noqa: F401
import torch

import slotmamba.train  # noqa: F401
from slotmamba.cli import main


def start(arguments: list[str], stdout: str, stderr: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for path, descriptor in ((stdout, 1), (stderr, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        code = 1
        try:
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return pid


def poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def serve() -> None:
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much with the first optimizer only
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps({"start": start, "poll": poll}[name](*arguments)), flush=True)


if __name__ == "__main__":
    serve()
