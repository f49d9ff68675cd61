"""Ranks that train a toy model under FSDP2, save, load and fail.

Run as a module it is a server of them: ["start", OUTPUT, ..., [RANK, SIZE, PORT], FUNCTION, ARGUMENT, ...]
(tests/forking.py).
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import slotmamba.checkpoint.contents
import slotmamba.engines.fsdp2
from slotmamba.checkpoint import CheckpointStore, Group, TensorContents
from slotmamba.checkpoint.folder import CheckpointFolder
from slotmamba.checkpoint.manifest import step_name
from slotmamba.checkpoint.tensors import local, read_tensors
from tests.checkpoint.toy_run import CONFIG, ToyRun
from tests.forking import forked, serve


class WholeRun(ToyRun):
    """The toy run with an optimizer that rounds alike however the tensors are cut: the fused one has other arithmetic
    for the rest of a tensor that does not fill a vector."""

    fused = False


class ShardedRun(WholeRun):
    """The toy run on all ranks, each of which sees the whole batch: the gradients are those of one process.

    The sizes 7, 5, 3 and 1 leave some ranks without a part; the temperature, a scalar, cannot be sharded.
    """

    def prepare(self, run_dir: Path, keep: int) -> CheckpointStore:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh, ignored_params={self.model.temperature})
        return CheckpointStore(run_dir, keep, CONFIG, Group(dist.get_rank(), dist.get_world_size()))

    @property
    def contents(self) -> TensorContents:
        return TensorContents(self.model, self.optimizer, "fsdp2")

    def save_in_background(self) -> None:
        self.store.start_saving(self.step, self.contents, {"samples": 10 * self.step})


def everywhere(flag: bool) -> bool:
    missing = torch.tensor(int(not flag))
    dist.all_reduce(missing)
    return not missing


def train(run_dir: str, steps: int, background: bool) -> None:
    """Resume, then steps with a save after each."""
    run = ShardedRun(Path(run_dir))
    run.store.clean()
    run.resume()
    for _ in range(steps):
        run.advance()
        if background:
            run.store.poll(everywhere)
            run.save_in_background()
        else:
            run.save()
    run.store.wait()


def copy(run_dir: str, target: str) -> None:
    """Load the newest checkpoint and save what was restored into another run."""
    run = ShardedRun(Path(run_dir), seed=dist.get_rank())
    assert run.resume()
    run.store.folder = CheckpointFolder(Path(target) / "checkpoints", 2)
    run.save()


def save_with_limit(run_dir: str, rank: int, size: int, background: bool) -> None:
    """Resume, advance, save, while one rank has no room for a file of more than `size` bytes; prints the error."""
    run = ShardedRun(Path(run_dir))
    run.resume()
    run.advance()
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    message = ""
    try:
        if background:
            run.save_in_background()
            run.advance()
            run.store.wait()
        else:
            run.save()
    except OSError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(1, f"{message}\n".encode())
    assert run.store.committed() == [1]


def save_and_die(run_dir: str, rank: int, operation: int, background: bool) -> None:
    """Resume, advance, save; one rank dies just before its file operation with the given number."""
    run = ShardedRun(Path(run_dir))
    run.resume()
    run.advance()
    seen = 0

    def die(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        names_the_run = event in ("open", "os.mkdir") and run_dir in str(args[0])
        if names_the_run or event in ("os.rename", "os.remove", "os.rmdir"):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        sys.addaudithook(die)
    if background:
        run.save_in_background()
        run.store.wait()
    else:
        run.save()


def damage_while_reading(run_dir: str) -> None:
    """One rank reads other values than those that were written: all say so, and take the checkpoint before."""

    def read(folder: Path, tensors: dict[str, torch.Tensor], group: Group) -> None:
        read_tensors(folder, tensors, group)
        if folder.name == step_name(2) and dist.get_rank() == 1:
            local(tensors["model.embedding.weight"])[0, 0] += 1

    vars(slotmamba.checkpoint.contents)["read_tensors"] = read
    run = ShardedRun(Path(run_dir))
    assert run.resume()
    os.write(1, f"resumed {run.step}\n".encode())


FUNCTIONS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (train, copy, save_with_limit, save_and_die, damage_while_reading)
}


def start(output: str, _: str, place: list[int], name: str, *arguments: Any) -> int:
    def run() -> int:
        rank, size, port = place
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        FUNCTIONS[name](*arguments)
        return 0

    return forked(output, output, run)


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much with the first optimizer only
    serve(start)
