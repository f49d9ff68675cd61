"""Server of `slotmamba` commands: ["start", STDOUT, STDERR, [ARGUMENT, ...]] (tests/forking.py)."""

from __future__ import annotations

from functools import partial

import matplotlib.figure  # noqa: F401
import torch

import slotmamba.train  # noqa: F401
from slotmamba.cli import main
from tests.forking import forked, serve


def start(stdout: str, stderr: str, arguments: list[str]) -> int:
    return forked(stdout, stderr, partial(main, arguments))


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much with the first optimizer only
    serve(start)
