"""Runs of the tiny recipe without the loop around them, to be saved by one world and resumed by another."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.tensor import DTensor

from slotmamba.batch import plan_source
from slotmamba.checkpoint import CheckpointStore, Group
from slotmamba.engines import Engine, build_engine
from slotmamba.global_step import GlobalStep
from slotmamba.schedule import learning_rate
from slotmamba.world import World
from slotmamba_data import PlanReader, open_plan
from tests.distributed.tiny import tiny

Values = dict[str, bytes]
"""Weights and moments, whole."""


class Run:
    """A run of the tiny recipe, without the loop around it."""

    def __init__(self, world: World, folder: Path, settings: list[str], run_dir: str = "run") -> None:
        self.recipe = tiny(folder, settings)
        self.engine = build_engine(self.recipe, world)
        model = self.recipe.model.model_dump(mode="json")
        self.store = CheckpointStore(folder / run_dir, 2, model, Group(world.rank, world.size))
        self.plan = open_plan(
            list(map(plan_source, self.recipe.data.sources)), self.recipe.data.seq_len, self.recipe.seed
        )
        self.reader = PlanReader(self.plan)
        self.step = 0

    def advance(self, count: int) -> list[float]:
        train_step = GlobalStep(self.recipe, self.engine)
        losses = []
        for _ in range(count):
            losses.append(train_step(self.reader, learning_rate(self.recipe.optim, self.step, 20)).loss)
            self.step += 1
        return losses

    def save(self) -> None:
        self.store.save(self.step, self.engine.contents(), {"data": self.reader.state()})

    def resume(self) -> None:
        found = self.store.load_latest(self.engine.contents())
        assert found is not None
        self.step, progress = found
        self.reader = PlanReader.from_state(self.plan, progress["data"])


def values(engine: Engine) -> Values:
    found = {}
    for name, tensor in engine.tensors().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = whole.detach().numpy().tobytes()
    return found


def save_after(world: World, folder: Path, settings: list[str], count: int) -> tuple[Values, list[float]]:
    """What was saved after some steps, and the losses of the five steps after it."""
    run = Run(world, folder, settings)
    run.advance(count)
    run.save()
    saved = values(run.engine)
    return saved, run.advance(5)


def resume(world: World, folder: Path, settings: list[str]) -> tuple[int, Values, list[float]]:
    run = Run(world, folder, settings)
    run.resume()
    return run.step, values(run.engine), run.advance(5)
