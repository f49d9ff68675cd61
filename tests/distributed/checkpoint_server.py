"""Starts the functions of checkpoint_ranks.py in worlds of processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed.ranks import free_port
from tests.train.runs import Command


class CheckpointRanks:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.checkpoint_ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(self, size: int, name: str, *arguments: object, seconds: float = 60) -> tuple[list[int], list[str]]:
        """Exit codes and outputs of `size` ranks that all call a function; they are killed after `seconds`."""
        port = free_port()
        ranks = []
        for rank in range(size):
            output = self._folder / f"{next(self._numbers)}.out"
            output.touch()
            pid = self._request([rank, size, port], str(output), name, *arguments)
            ranks.append(Command(pid, partial(self._request, pid), output))
        deadline = time.monotonic() + seconds
        for command in ranks:
            while command.poll() is None:
                if time.monotonic() > deadline:
                    for each in ranks:
                        if each.poll() is None:
                            os.kill(each.pid, 9)
                    raise AssertionError(f"{name} hangs: {[each.out for each in ranks]}")
                time.sleep(0.005)
        return [command.wait() for command in ranks], [command.out for command in ranks]

    def succeed(self, size: int, name: str, *arguments: object) -> list[str]:
        codes, outputs = self.run(size, name, *arguments)
        assert codes == [0] * size, outputs
        return outputs

    def close(self) -> None:
        self._server.communicate()

    def _request(self, *request: object) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())
