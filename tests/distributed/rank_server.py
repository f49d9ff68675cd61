"""Starts ranks, each in a process forked from this one, which has imported everything already.

Run as a module it reads a request a line, a JSON array, and answers each with a line:

    ["start", [ARGUMENT, ...], {VARIABLE: VALUE, ...}, STDOUT, STDERR]    a `slotmamba` command; its process number
    ["poll", PID]              its exit code, or null while it runs; minus the signal that ended it
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

import slotmamba.engines.fsdp2
import slotmamba.train  # noqa: F401
from slotmamba.cli import main
from tests.distributed import injected


def start(arguments: list[str], environment: dict[str, str], stdout: str, stderr: str) -> int:
    pid = os.fork()
    if pid == 0:
        for path, descriptor in ((stdout, 1), (stderr, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.environ.update(environment)
        code = 1
        try:
            injected.inject()
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return pid


def poll(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much with the first optimizer only
    for line in sys.stdin:
        name, *request = json.loads(line)
        print(json.dumps({"start": start, "poll": poll}[name](*request)), flush=True)
