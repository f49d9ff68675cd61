"""Functions that run in every process of a world: real processes, real gloo, a free port."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import pytest

from slotmamba.world import joined
from tests.distributed.ranks import free_port

Result = TypeVar("Result")

# The server imports what every process needs, once; processes are forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["slotmamba.engines.fsdp2", "slotmamba.global_step", "deepspeed"])


def run_world(size: int, function: Callable[..., Result], *arguments: Any, seconds: float = 120) -> list[Result]:
    """What `function(world, *arguments)`, of a module that can be imported, returns in each process, by rank.

    A failure in one of them, or more than `seconds`, fails the test; no process is left over.
    """
    port = free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, size, port, sender, function, arguments))
        for rank, (_, sender) in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        end = time.monotonic() + seconds
        answers = [_answer(rank, receiver, end) for rank, (receiver, _) in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Where one has failed the others have lost their connection to it: what they say comes last.
    failures = sorted((text for text, _ in answers if text is not None), key=lambda text: "onnection" in text)
    if failures:
        pytest.fail(failures[0], pytrace=False)
    return [result for _, result in answers]


def _answer(rank: int, receiver: Connection, end: float) -> tuple[str | None, Any]:
    if not receiver.poll(max(0.0, end - time.monotonic())):
        return f"rank {rank} did not answer in time: connection", None
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return f"rank {rank} died: connection", None


def _rank(
    rank: int, size: int, port: int, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # The fork server's module of torch was imported before OMP_NUM_THREADS could say so.
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with joined("cpu") as world:
            _send(sender, None, function(world, *arguments))
            world.any(False)  # nobody leaves before all have answered
    except BaseException:
        _send(sender, f"rank {rank}: {traceback.format_exc()}", None)


def _send(sender: Connection, failure: str | None, result: object) -> None:
    # Plain pickles: torch's own would hold tensors in files of the process that sends them.
    sender.send_bytes(pickle.dumps((failure, result)))
