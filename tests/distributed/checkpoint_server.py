"""Starts the functions of checkpoint_ranks.py in worlds of processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.distributed.ranks import free_port
from tests.forking import Server


class CheckpointRanks:
    def __init__(self, folder: Path) -> None:
        self._server = Server("tests.distributed.checkpoint_ranks", folder)

    def run(self, size: int, name: str, *arguments: object, seconds: float = 60) -> tuple[list[int], list[str]]:
        """Exit codes and outputs of `size` ranks that all call a function; they are killed after `seconds`."""
        port = free_port()
        ranks = [self._server.start([rank, size, port], name, *arguments) for rank in range(size)]
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
        self._server.close()
