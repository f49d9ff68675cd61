"""The processes that train together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from slotmamba.device import choose_device
from slotmamba.errors import InputError, SlotMambaError

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_JOIN_TIMEOUT = timedelta(minutes=5)  # for nodes that read Python's files at different speeds
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes that train together; one process without torchrun is a world of size 1 that communicates nothing.

    Every method that communicates is a collective: all processes call it, in the same order.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device) -> World:
        return cls(rank=0, size=1, local_rank=0, device=device)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that locks the run folder, writes to it and prints."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process. Goes over gloo, so that it never waits for a GPU's stream."""
        return bool(self.sum(torch.tensor(int(flag))))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, a copy on the tensor's device (CPU: gloo, GPU: NCCL)."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def broadcast(self, value: T) -> T:
        """What the main process passes, JSON-like; what the others pass is not looked at."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=_CPU)
        return box[0]

    def gather(self, value: T) -> list[T] | None:
        """What each process passes, JSON-like, in the order of ranks; None in all but the main process."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values


@contextmanager
def joined(device_setting: str) -> Iterator[World]:
    """Joins the processes that torchrun, or a launcher that sets the same variables, has started together.

    Without these variables the world is this process alone, and nothing is initialised. Communication of CPU tensors
    goes over gloo, of GPU tensors over NCCL.

    Args:
        device_setting: the recipe's train.device; on GPUs each process takes the one with its local rank.

    Raises:
        InputError: the variables are incomplete, or there are fewer GPUs than processes on this machine.
        SlotMambaError: not all of the processes have joined within five minutes; rank 0's names those that have not.
    """
    device = choose_device(device_setting, "train.device")
    given = [name for name in _VARIABLES if name in os.environ]
    try:
        if "RANK" not in given and "WORLD_SIZE" not in given:
            yield World.alone(device)
        else:
            yield _join(device, [name for name in _VARIABLES if name not in given])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ensure_process_group(world: World) -> None:
    """Gives a process that runs alone a process group of one, which sharding engines need."""
    if not dist.is_initialized():
        assert world.size == 1
        store = HashStore()
        dist.init_process_group(_backend(world.device), store=store, rank=0, world_size=1)


def _join(device: torch.device, missing: list[str]) -> World:
    if missing:
        raise InputError(
            f"RANK or WORLD_SIZE is set, but not {', '.join(missing)}: start the processes with torchrun, "
            "or set them all"
        )
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(
                f"the process of local rank {local_rank} finds {count} GPUs: start at most {count} processes a machine "
                "(torchrun --nproc-per-node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    store = _meet(rank, size)
    dist.init_process_group(_backend(device), store=store, rank=rank, world_size=size, timeout=_JOIN_TIMEOUT)
    return World(rank, size, local_rank, device)


def _meet(rank: int, size: int) -> Store:
    """Where the processes find one another, when all are there: torch's own wait would not say who is missing."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address, int(port), size, is_master=rank == 0 and not by_torchrun, timeout=_JOIN_TIMEOUT,
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        store.set(f"joined/{rank}", "")
        if rank == 0:
            _wait_for_all(store, size)
            store.set("all joined", "")
        else:
            store.wait(["all joined"], 2 * _JOIN_TIMEOUT)  # rank 0 has the last word, and may have come later
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise SlotMambaError(
            f"rank {rank} could not join the others at {address}:{port} (MASTER_ADDR, MASTER_PORT), or rank 0 has "
            f"ended: {reason}"
        ) from error
    return store


def _wait_for_all(store: Store, size: int) -> None:
    try:
        store.wait([f"joined/{rank}" for rank in range(size)], _JOIN_TIMEOUT)
    except dist.DistStoreError as error:
        missing = [str(rank) for rank in range(size) if not store.check([f"joined/{rank}"])]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise SlotMambaError(
            f"{size - len(missing)} of {size} processes have joined within {_JOIN_TIMEOUT.total_seconds():.0f} s; "
            f"missing: rank {', '.join(missing[:8])}{more}"
        ) from error


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
