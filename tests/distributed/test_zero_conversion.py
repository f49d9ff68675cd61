"""Checkpoints of ZeRO on their way to another number of processes: in silence, on a full disk, and killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba.world import World
from tests.disks import mounted_disk
from tests.distributed.ranks import Launcher
from tests.distributed.saved_runs import Run, Values, resume, save_after, values
from tests.distributed.tiny import zero
from tests.distributed.worlds import run_world
from tests.forking import ROOT
from tests.train.runs import committed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

UNIVERSAL = ".universal-step-00000001"


def test_started_without_a_launcher_and_resumed_by_two(launcher: Launcher, tmp_path: Path) -> None:
    """Nothing but our own lines: no progress bars, no chatter of DeepSpeed's."""
    run_dir = tmp_path / "run"
    command = launcher.command(run_dir, "parallel.engine=deepspeed", "parallel.shard=1", "train.steps=2")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    alone = subprocess.run(
        [sys.executable, "-m", "slotmamba.cli", *command],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (alone.returncode, alone.stderr) == (0, "")
    assert committed(run_dir) == [2]

    job = launcher.start(run_dir, "parallel.engine=deepspeed", "parallel.shard=2", "train.steps=3")
    assert job.wait(seconds=150) == [0, 0], job.err
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    universal = checkpoint.with_name(".universal-step-00000002")
    assert job.err.splitlines() == [
        f"{checkpoint} was saved by a world of 1, this is one of 2: converting it in {universal}"
    ]
    assert "MPU" not in job.out and "resumes after step 2" in job.out
    assert committed(run_dir) == [2, 3]


def resume_without_room(
    world: World, folder: Path, settings: list[str], rooms: list[int]
) -> tuple[list[tuple[str, list[str]]], Values]:
    """The errors of resuming with so many bytes left on the folder's disk, and the checkpoints then; what is restored
    with more."""
    filler = folder / "filler"
    run = Run(world, folder, settings)
    found = []
    for room in rooms:
        if world.is_main:
            fill(filler, room)
        with pytest.raises(OSError, match="cannot convert") as caught:
            run.resume()
        found.append((str(caught.value), os.listdir(folder / "run" / "checkpoints")))
        world.any(False)  # nobody goes on before all have looked
    if world.is_main:
        filler.unlink()
    run.resume()
    return found, values(run.engine)


def fill(filler: Path, room: int) -> None:
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - room)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """All processes say so, nothing of the copy is left, the checkpoint is, and with room it is read."""
    with mounted_disk(tmp_path, "16m") as disk:
        saved, _ = run_world(1, save_after, disk, zero(3, 1), 1)[0]
        checkpoints = disk / "run" / "checkpoints"
        place = f"{checkpoints}/step-00000001 for another number of processes in {checkpoints}/{UNIVERSAL}: "
        for found, restored in run_world(2, resume_without_room, disk, zero(3, 2), [0, 16 * 4096]):
            for error, left in found:
                assert error.startswith(f"cannot convert {place}")
                assert left == ["step-00000001"]
            assert restored == saved


def die_while_converting(world: World, folder: Path, settings: list[str], files: int) -> None:
    """Resumes; the main process is killed before it writes so many files of the copy."""
    run = Run(world, folder, settings)
    opened: set[str] = set()

    def die(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and UNIVERSAL in str(arguments[0]):
            opened.add(str(arguments[0]))
            if len(opened) == files:
                os.kill(os.getpid(), signal.SIGKILL)

    if world.is_main:
        sys.addaudithook(die)
    run.resume()


def clean_and_resume(world: World, folder: Path, settings: list[str]) -> tuple[int, bool]:
    """As `slotmamba train` starts; the step, and whether a copy was left when it had cleaned."""
    run = Run(world, folder, settings)
    run.store.clean()
    left = (folder / "run" / "checkpoints" / UNIVERSAL).exists()
    run.resume()
    return run.step, left


def test_killed_while_it_is_converted(tmp_path: Path) -> None:
    """What is left is removed by the next start, and never read: by one that converts anew without cleaning, too."""
    saved, _ = run_world(1, save_after, tmp_path, zero(1, 1), 1)[0]
    universal = Path("run") / "checkpoints" / UNIVERSAL
    with pytest.raises(pytest.fail.Exception, match="rank 0 died"):
        run_world(2, die_while_converting, tmp_path, zero(1, 2), 20)
    assert list((tmp_path / universal).rglob("*.pt"))
    shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")

    step, restored, _ = run_world(2, resume, tmp_path, zero(1, 2))[0]
    assert (step, restored) == (1, saved)
    assert not (tmp_path / universal).exists()
    assert run_world(1, clean_and_resume, tmp_path / "copy", zero(1, 1)) == [(1, False)]
