"""Ranks that train a toy model under FSDP2, save, load and fail.

Run as a module it reads calls, a JSON array ``[[RANK, SIZE, PORT], OUTPUT, FUNCTION, ARGUMENT, ...]`` a line, makes each
in a process of its own, forked from this one that has imported everything already, and answers with its number;
``[PID]`` asks for its exit code, null while it runs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import slotmamba.engines.fsdp2  # noqa: F401
from slotmamba.checkpoint import CheckpointStore, Group, TensorContents
from slotmamba.checkpoint.folder import CheckpointFolder
from slotmamba.checkpoint.manifest import step_name
from slotmamba.config import load_recipe
from slotmamba.engines import build_engine
from slotmamba.world import World
from tests.checkpoint.toy_run import CONFIG, ToyRun


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


def copy_recipe_run(recipe: str, run_dir: str, target: str, *overrides: str) -> None:
    """The same with the engine and the model of a recipe; prints the step."""
    settings = load_recipe(recipe, [f"run_dir={run_dir}", *overrides])
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    engine = build_engine(settings, world)
    model = settings.model.model_dump(mode="json")
    stores = [CheckpointStore(Path(each), 2, model, Group(world.rank, world.size)) for each in (run_dir, target)]
    found = stores[0].load_latest(engine.contents())
    assert found is not None
    stores[1].save(found[0], engine.contents(), found[1])


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
    from slotmamba.checkpoint import contents

    original = contents.read_tensors

    def read(folder: Path, tensors: dict[str, torch.Tensor], group: Group) -> None:
        original(folder, tensors, group)
        if folder.name == step_name(2) and dist.get_rank() == 1:
            contents.local(tensors["model.embedding.weight"])[0, 0] += 1

    contents.read_tensors = read
    run = ShardedRun(Path(run_dir))
    assert run.resume()
    os.write(1, f"resumed {run.step}\n".encode())


def serve(functions: dict[str, Callable[..., None]]) -> None:
    for line in sys.stdin:
        request: list[Any] = json.loads(line)
        if len(request) == 1:
            ended, status = os.waitpid(request[0], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
        else:
            print(_start(functions, *request), flush=True)


def _start(functions: dict[str, Callable[..., None]], place: list[int], output: str, name: str, *arguments: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        rank, size, port = place
        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        functions[name](*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much with the first optimizer only
    serve(
        {
            each.__name__: each
            for each in (train, copy, copy_recipe_run, save_with_limit, save_and_die, damage_while_reading)
        }
    )
