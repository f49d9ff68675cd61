"""Checkpoints of DeepSpeed's ZeRO: what it saves, with our manifest, at any number of processes."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from slotmamba.checkpoint.manifest import read_manifest, step_name
from slotmamba.errors import InputError
from slotmamba.seed_checkpoint import write_seed_checkpoint
from slotmamba.world import World
from tests.distributed.saved_runs import Run, Values, resume, save_after, values
from tests.distributed.tiny import SINGLE, fsdp2, tiny, trained, zero
from tests.distributed.worlds import run_world

pytestmark = pytest.mark.timeout(300)


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
        assert not universal.exists()


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
        "parallel.engine=deepspeed"
    ]
    assert run_world(1, refused, tmp_path, zero(3, 1)) == [
        f"{checkpoint} was saved by ZeRO stage 1: set parallel.zero_stage=1"
    ]


def start(world: World, folder: Path, settings: list[str]) -> tuple[Values, list[float]]:
    """Weights restored from a seed checkpoint, and the first losses."""
    run = Run(world, folder, settings)
    found = run.store.load_latest(run.engine.contents())
    assert found == (0, {"seed": 11})
    return values(run.engine), run.advance(3)


@pytest.mark.slow
def test_every_engine_starts_from_a_seed_checkpoint(tmp_path: Path) -> None:
    """Its weights are of another seed than the run's own; losses equal to 1e-5 relative."""
    write_seed_checkpoint(tiny(tmp_path, ["seed=11", f"run_dir={tmp_path}/run"]))
    own = run_world(1, trained, tmp_path, [SINGLE], 1)[0][0][0].loss
    weights, losses = run_world(1, start, tmp_path, SINGLE)[0]
    assert losses[0] != pytest.approx(own, rel=1e-3)
    for settings in (zero(1, 2), zero(3, 2), fsdp2(2)):
        others, same = run_world(2, start, tmp_path, settings)[0]
        assert others == weights
        assert same == pytest.approx(losses, rel=1e-5)


def save_without_room(world: World, folder: Path, settings: list[str]) -> str:
    """The error of a save in which the last process has no room for a file of 4 KiB."""
    run = Run(world, folder, settings)
    run.advance(1)
    run.save()
    run.advance(1)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        run.save()
    except OSError as error:
        return str(error.strerror)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


@pytest.mark.slow
def test_one_process_has_no_room(tmp_path: Path) -> None:
    """DeepSpeed's own barriers between its writes leave nobody waiting; the checkpoint before stays."""
    folder = tmp_path / "run" / "checkpoints"
    message = (
        f"cannot write checkpoint {folder}/step-00000002: File too large (rank 1); "
        f"the last good one is {folder}/step-00000001"
    )
    assert run_world(2, save_without_room, tmp_path, zero(2, 2)) == [message, message]
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    step, *_ = run_world(2, resume, tmp_path, zero(2, 2))[0]
    assert step == 1
