"""What checkpoints cost the steps beside them: ``torchrun --nproc-per-node=2 scripts/time_checkpoints.py RECIPE``.

Trains RECIPE three times from its first step, without checkpoints, with a checkpoint in place and with one in the
background every few steps, and prints a table: the median time of a step, of a step during which a checkpoint is being
written, the time for which a save holds up training, and how long a save takes until it is committed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

from slotmamba.batch import training_plan
from slotmamba.checkpoint import CheckpointStore, Group
from slotmamba.config import load_recipe
from slotmamba.config.schema import Recipe
from slotmamba.engines import build_engine
from slotmamba.global_step import GlobalStep
from slotmamba.world import World, joined
from slotmamba_data import PlanReader

MODES = ("none", "sync", "async")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, help="where to write them; a temporary folder by default")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    with joined(recipe.train.device) as world:
        folder = world.broadcast(tempfile.mkdtemp(dir=args.folder) if world.is_main else "")
        if world.is_main:
            print("checkpoints | step, ms | step beside a save, ms | held up by a save, ms | until committed, ms")
        try:
            for mode in MODES:
                _report(world, mode, _measure(recipe, world, mode, args.steps, args.every, Path(folder) / mode))
        finally:
            if world.is_main:
                shutil.rmtree(folder)


def _measure(recipe: Recipe, world: World, mode: str, steps: int, every: int, run_dir: Path) -> dict[str, list[float]]:
    """Milliseconds by what was timed; the first three steps, which compile and fill caches, are left out."""
    engine = build_engine(recipe, world)
    store = CheckpointStore(run_dir, 1, recipe.model.model_dump(mode="json"), Group(world.rank, world.size))
    plan = training_plan(recipe)
    reader, train_step = PlanReader(plan), GlobalStep(recipe, engine)
    times: dict[str, list[float]] = defaultdict(list)
    started: float | None = None
    for step in range(1, steps + 1):
        if store.poll(lambda written: not world.any(not written)) is not None and started is not None:
            times["committed"].append(_since(started))
            started = None
        began = _now(world)
        train_step(reader, recipe.optim.lr)
        if step > 3:
            times["beside" if started is not None else "step"].append(_since(began, world))
        if mode == "none" or step % every:
            continue
        began = _now(world)
        if mode == "sync":
            store.save(step, engine.contents(), {})
            times["committed"].append(_since(began, world))
        else:
            store.start_saving(step, engine.contents(), {})
            started = began
        times["held up"].append(_since(began, world))
    store.wait()
    plan.close()
    return times


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _since(began: float, world: World | None = None) -> float:
    return 1000 * ((time.perf_counter() if world is None else _now(world)) - began)


def _report(world: World, mode: str, times: dict[str, list[float]]) -> None:
    columns = [times.get(key, []) for key in ("step", "beside", "held up", "committed")]
    texts = [f"{statistics.median(column):.1f}" if column else "-" for column in columns]
    if world.is_main:
        print(f"{mode} | {' | '.join(texts)}", flush=True)


if __name__ == "__main__":
    main()
