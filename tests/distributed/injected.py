"""Faults put into a `slotmamba` process from outside, and as a script `slotmamba` with them, for torchrun to start.

INJECT is ``FAULT:RANK:STEP``, several with commas in between; RANK ``*`` is every rank, STEP ``*`` every step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import slotmamba.evaluate.validation
import slotmamba.global_step
from slotmamba.cli import main
from slotmamba.errors import InputError


def hang() -> None:
    time.sleep(1000)


def slow() -> None:
    time.sleep(0.2)


def bug() -> None:
    raise ZeroDivisionError("a bug")


def bad_input() -> None:
    raise InputError("the shards of this rank are not there")


def leave() -> None:
    os._exit(0)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def usr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


FAULTS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (hang, slow, bug, bad_input, leave, kill, usr1)
}


def inject() -> None:
    """Wraps what INJECT names: steps, with the faults above or `nan`; validation batches with `validation-FAULT`."""
    for each in filter(None, os.environ.get("INJECT", "").split(",")):
        fault, rank, step = each.split(":")
        if rank in ("*", os.environ["RANK"]):
            _wrap(fault, None if step == "*" else int(step))


def _wrap(fault: str, step: int | None) -> None:
    holder: type
    if fault.startswith("validation-"):
        holder, name = slotmamba.evaluate.validation.SlotMamba, "losses"
    else:
        holder, name = slotmamba.global_step.GlobalStep, "_accumulate" if fault == "nan" else "__call__"
    original = getattr(holder, name)
    calls = 0

    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if name != "losses" or not self.training:
            calls += 1
            if step is None or calls == step:
                if fault == "nan":
                    return _with_nan(self, original, *arguments, **named)
                FAULTS[fault.removeprefix("validation-")]()
        return original(self, *arguments, **named)

    setattr(holder, name, wrapped)


def _with_nan(step: Any, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    losses = step.engine.losses

    def spoilt(**inputs: Any) -> Any:
        found = losses(**inputs)
        return (
            replace(found, nll=found.nll * float("nan"))
            if hasattr(found, "__dataclass_fields__")
            else found._replace(nll=found.nll * float("nan"))
        )

    step.engine.losses = spoilt
    try:
        return original(step, *arguments, **named)
    finally:
        step.engine.losses = losses


if __name__ == "__main__":
    inject()
    sys.exit(main(sys.argv[1:]))
