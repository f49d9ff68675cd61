"""Server of ranks: ["start", STDOUT, STDERR, [ARGUMENT, ...], {VARIABLE: VALUE, ...}], a `slotmamba` command in an
environment, with faults that it may ask for (tests/forking.py)."""

from __future__ import annotations

import os

import torch

import slotmamba.engines.fsdp2
import slotmamba.train  # noqa: F401
from slotmamba.cli import main
from tests.distributed import injected
from tests.forking import forked, serve


def start(stdout: str, stderr: str, arguments: list[str], environment: dict[str, str]) -> int:
    def run() -> int:
        os.environ.update(environment)
        injected.inject()
        return main(arguments)

    return forked(stdout, stderr, run)


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much with the first optimizer only
    serve(start)
