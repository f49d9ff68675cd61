"""Child processes that train, save and crash.

Run as a module it reads calls, a JSON array ``[function, argument, ...]`` a line, makes each in a process of its own,
forked from this one that has imported torch already, and prints ``exit CODE`` when that has ended.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from tests.checkpoint.toy_run import ToyRun


def train_for_ever(run_dir: str) -> None:
    run = ToyRun(Path(run_dir))
    run.store.clean()
    run.resume()
    print(os.getpid(), flush=True)
    while True:
        run.advance().save()


def save_and_die(run_dir: str, steps: int, keep: int, operation: int) -> None:
    """Resume, advance, save; die just before the file operation with the given number."""
    run = ToyRun(Path(run_dir), keep=keep)
    run.resume()
    run.advance(steps)
    operations = itertools.count(1)

    def die(event: str, args: tuple[object, ...]) -> None:
        # Opening a folder comes before its fsync.
        names_the_run = event in ("open", "os.mkdir") and run_dir in str(args[0])
        if (names_the_run or event in ("os.rename", "os.remove", "os.rmdir")) and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    run.save()


def save_with_limit(run_dir: str, size: int) -> None:
    """Resume, advance, save, with no room for a file of more than ``size`` bytes; prints the error."""
    run = ToyRun(Path(run_dir))
    run.resume()
    run.advance()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        run.save()
    except OSError as error:
        print(error, flush=True)


def import_everything() -> None:
    """What torch imports late. No backward pass: after one, torch refuses to make another in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        run = ToyRun(Path(folder))
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.optimizer.step()
        run.save()
        run.resume()


def main() -> None:
    import_everything()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                globals()[name](*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print("exit", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
