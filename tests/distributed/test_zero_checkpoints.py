"""Checkpoints of DeepSpeed's ZeRO: what it saves, with our manifest, at any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba.batch import plan_source
from slotmamba.checkpoint import CheckpointStore, Group
from slotmamba.checkpoint.manifest import read_manifest, step_name
from slotmamba.engines import Engine, build_engine
from slotmamba.errors import InputError
from slotmamba.global_step import GlobalStep
from slotmamba.schedule import learning_rate
from slotmamba.world import World
from slotmamba_data import PlanReader, open_plan
from tests.distributed.tiny import fsdp2, tiny, zero
from tests.distributed.worlds import run_world

Values = dict[str, bytes]
"""Weights and moments."""

pytestmark = pytest.mark.timeout(300)


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
    return {name: tensor.detach().numpy().tobytes() for name, tensor in engine.tensors().items()}


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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumes_on_any_number_of_processes(tmp_path: Path, stage: int) -> None:
    """Exactly the same weights and moments; then the same losses to 1e-4 relative, and bit for bit on as many."""
    saved, expected = run_world(2, save_after, tmp_path, zero(stage, 2), 3)[0]
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / step_name(3))
    assert (manifest.engine, manifest.zero_stage, manifest.world_size) == ("deepspeed", stage, 2)
    assert manifest.updates == 3 and manifest.finite and len(manifest.tensors) == 16
    for size in (2, 4, 1):
        settings = zero(stage, size)
        step, restored, losses = run_world(size, resume, tmp_path, settings)[0]
        assert step == 3
        assert restored == saved
        if size == 2:
            assert losses == expected
        else:
            assert losses == pytest.approx(expected, rel=1e-4)
        universal = tmp_path / "run" / "checkpoints" / ".universal-step-00000003"
        assert universal.exists() == (size != 2)


def refused(world: World, folder: Path, settings: list[str]) -> str:
    run = Run(world, folder, settings)
    try:
        run.resume()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_another_engine_or_stage_is_refused(tmp_path: Path) -> None:
    run_world(1, save_after, tmp_path, zero(1, 1), 1)
    checkpoint = tmp_path / "run" / "checkpoints" / step_name(1)
    assert run_world(1, refused, tmp_path, fsdp2(1)) == [
        f"{checkpoint} was saved by parallel.engine=deepspeed, whose files fsdp2 cannot read: set "
        "parallel.engine=deepspeed, or convert it with `slotmamba convert`"
    ]
    assert run_world(1, refused, tmp_path, zero(3, 1)) == [
        f"{checkpoint} was saved by ZeRO stage 1: set parallel.zero_stage=1, or convert it with `slotmamba convert`"
    ]
