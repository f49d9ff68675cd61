"""Faults put into a `slotmamba` process from outside, and as a script `slotmamba` with them, for torchrun to start.

INJECT is ``FAULT:RANK:CALL``, several with commas in between: on that RANK, when the function that the fault is put
into is called for the CALLth time; ``*`` is every rank or call.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import slotmamba.engines.fsdp2
import slotmamba.global_step
import slotmamba.models.slotmamba
import slotmamba.train
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


def crash() -> None:
    os.abort()


def usr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


FAULTS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (hang, slow, bug, bad_input, leave, kill, crash, usr1)
}


# Where a fault can come, by its prefix: before a step, a validation batch, or the model is built; in a step's loss or
# gradient.
PLACES: dict[str, tuple[Any, str]] = {
    "": (slotmamba.global_step.GlobalStep, "__call__"),
    "validation": (slotmamba.models.slotmamba.SlotMambaForCausalLM, "losses"),
    "building": (slotmamba.train, "build_engine"),
    "loss": (slotmamba.global_step.GlobalStep, "_accumulate"),
    "gradient": (slotmamba.engines.fsdp2.FSDP2Engine, "gradient_norm"),
}


def inject() -> None:
    """Does what INJECT says: the faults above, or `loss-nan` and `gradient-nan`."""
    for each in filter(None, os.environ.get("INJECT", "").split(",")):
        fault, rank, call = each.split(":")
        if rank in ("*", os.environ["RANK"]):
            place, _, fault = fault.rpartition("-")
            _wrap(place, fault, None if call == "*" else int(call))


def _wrap(place: str, fault: str, call: int | None) -> None:
    holder, name = PLACES[place]
    original = getattr(holder, name)
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if place == "validation" and arguments[0].training:
            return original(*arguments, **named)
        calls += 1
        if call not in (None, calls):
            return original(*arguments, **named)
        if fault == "nan":
            return _with_nan(place, original, *arguments, **named)
        FAULTS[fault]()
        return original(*arguments, **named)

    setattr(holder, name, wrapped)


def _with_nan(place: str, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    if place == "gradient":
        for parameter in arguments[0].model.parameters():
            parameter.grad.to_local().fill_(float("nan"))
        return original(*arguments, **named)
    engine = arguments[0].engine

    def spoilt(**inputs: Any) -> Any:
        found = type(engine).losses(engine, **inputs)
        return replace(found, nll=found.nll * float("nan"))

    engine.losses = spoilt
    try:
        return original(*arguments, **named)
    finally:
        del engine.losses


if __name__ == "__main__":
    inject()
    sys.exit(main(sys.argv[1:]))
