"""Checkpoints survive processes that are killed and disks that are full: real ones."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.toy_run import ToyRun
from tests.disks import mounted_disk

KILLED = f"exit {-signal.SIGKILL}"


class Children:
    """crash_children.py as a program."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.crash_children"],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, name: str, *arguments: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([name, *arguments], default=str) + "\n")
        self.server.stdin.flush()

    def read(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().rstrip("\n")

    def close(self) -> None:
        self.server.communicate()


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    children = Children()
    yield children
    children.close()


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, children: Children) -> None:
    generator = random.Random(0)
    steps = [0]
    for _ in range(25):
        children.start("train_for_ever", tmp_path)
        pid = int(children.read())
        time.sleep(generator.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert children.read() == KILLED
        run = ToyRun(tmp_path, seed=1)
        run.store.clean()
        if run.resume():
            steps.append(run.step)
            assert run.step == run.store.committed()[-1], "the newest one did not load"
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert run.snapshot() == ToyRun(tmp_path / "uninterrupted").advance(run.step).snapshot()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "keep"), [(1, 2), (0, 1)], ids=["next step", "same step again"])
def test_killed_before_every_file_operation(tmp_path: Path, children: Children, steps: int, keep: int) -> None:
    prepared = tmp_path / "prepared"
    run = ToyRun(prepared, keep=keep)
    for _ in range(keep):
        run.advance().save()
    saved = run.step
    snapshots = {saved: run.snapshot(), saved + steps: run.advance(steps).snapshot()}
    seen = set()
    for operation in itertools.count(1):
        run_dir = tmp_path / str(operation)
        shutil.copytree(prepared, run_dir)
        children.start("save_and_die", run_dir, steps, keep, operation)
        ended = children.read()
        survivor = ToyRun(run_dir, keep=keep, seed=1)
        survivor.store.clean()
        assert not list(survivor.store.folder.path.glob(".*")), operation
        assert survivor.resume()
        assert survivor.step == survivor.store.committed()[-1]
        assert survivor.snapshot() == snapshots[survivor.step]
        seen.add(survivor.step)
        shutil.rmtree(run_dir)
        if ended != KILLED:
            break
    assert ended == "exit 0"
    assert operation > 15, "the hook saw too few operations"
    assert seen == set(snapshots)
    assert survivor.step == saved + steps


def test_no_room_for_a_file(tmp_path: Path, children: Children) -> None:
    run = ToyRun(tmp_path)
    size = (run.advance().save() / "__0_0.distcp").stat().st_size
    expected = run.snapshot()
    folder = tmp_path / "checkpoints"
    for limit in (0, 100, 2000, size // 2, size - 1):
        children.start("save_with_limit", tmp_path, limit)
        message = children.read()
        assert children.read() == "exit 0"
        assert f"cannot write checkpoint {folder}/step-00000002: " in message
        assert message.endswith(f"File too large; the last good one is {folder}/step-00000001")
        assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    run = ToyRun(tmp_path, seed=1)
    assert run.resume()
    assert run.snapshot() == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path, "400k") as disk:
        yield disk


def test_full_disk(small_disk: Path) -> None:
    run = ToyRun(small_disk)
    run.advance().save()
    expected = run.snapshot()
    run.advance()
    failures = 0
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        with pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(4096))
        # From no room at all to enough, page by page.
        while run.store.committed() == [1]:
            filler.truncate(filler.tell() - 4096 * failures)
            try:
                run.save()
            except OSError as error:
                failures += 1
                assert "No space left on device; the last good one is" in str(error)
                assert [path.name for path in run.store.folder.path.iterdir()] == ["step-00000001"]
    assert failures > 3
    assert run.store.committed() == [1, 2]
    run = ToyRun(small_disk, seed=1)
    run.store.load(1, run.contents)
    assert run.snapshot() == expected


def test_read_only_disk(small_disk: Path) -> None:
    run = ToyRun(small_disk)
    run.advance().save()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*step-00000002: Read-only file system; the last good"):
        run.advance().save()
    assert run.store.committed() == [1]


def test_no_checkpoint_at_all_yet(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="there is no earlier one"):
        ToyRun(tmp_path).advance().save()
