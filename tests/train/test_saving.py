"""How a run saves: in place or in the background, on a disk that is full, and without random states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slotmamba.cli import main
from slotmamba.evaluate.validation import Validation
from slotmamba.global_step import GlobalStep, StepResult
from slotmamba.run_folder import locked
from slotmamba.train import train
from slotmamba.world import World
from slotmamba_data import PlanReader
from tests.disks import mounted_disk
from tests.train.runs import Runs, assert_same_run, assert_same_tensors, committed, fails, records, succeeds, tensors

pytestmark = [pytest.mark.usefixtures("without_plots"), pytest.mark.timeout(300)]

EVERY_STEP = ["train.steps=5", "train.checkpoint.every=1"]


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slotmamba.train.plot_run", lambda run_dir: [])
        train(runs.recipe(run_dir, *EVERY_STEP))
    return run_dir


def test_saving_in_the_background_changes_nothing(runs: Runs, uninterrupted: Path, tmp_path: Path) -> None:
    train(runs.recipe(tmp_path, *EVERY_STEP, "train.checkpoint.async=true"))
    assert committed(tmp_path) == committed(uninterrupted) == [4, 5]
    assert_same_run(tmp_path, uninterrupted)


def test_training_and_validation_draw_no_random_numbers(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is why a checkpoint holds no state of a generator."""
    calls = []

    def states() -> tuple[object, ...]:
        return random.getstate(), repr(np.random.get_state(legacy=True)), torch.get_rng_state().numpy().tobytes()

    def watch(original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            before = states()
            result = original(*arguments, **named)
            assert states() == before
            calls.append(original)
            return result

        return watched

    monkeypatch.setattr(GlobalStep, "__call__", watch(GlobalStep.__call__))
    monkeypatch.setattr(Validation, "run", watch(Validation.run))
    train(runs.recipe(tmp_path, "train.steps=2"))
    assert len(calls) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path, "8m") as disk:
        yield disk


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_disk_that_is_full(
    runs: Runs, uninterrupted: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str],
    on_error: str, background: str,
) -> None:  # fmt: skip
    """The checkpoint before stays; training goes on if it is to, but does not end as if it had been saved."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(small_disk)
    settings = [*EVERY_STEP, f"train.checkpoint.on_error={on_error}", f"train.checkpoint.async={background}"]
    succeeds(runs.command(run_dir, *settings, "train.steps=2"))
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        with pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.tell() - 3 * 4096)  # room for a folder, not for the tensors

    assert main(runs.command(run_dir, *settings)) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    good = f"No space left on device; the last good one is {run_dir}/checkpoints/step-00000002"
    lines = [f"cannot write checkpoint {run_dir}/checkpoints/step-0000000{step}: {good}" for step in (3, 4, 5)]
    if on_error == "stop":
        assert (warnings, error) == ([], f"error: {lines[0]}")
    else:
        assert warnings == [f"{line}; training goes on (train.checkpoint.on_error=continue)" for line in lines[:2]]
        assert error == f"error: {lines[2]}"
    assert committed(run_dir)[-1] == 2
    assert not list(small_disk.glob(".*"))

    (small_disk / "filler").unlink()
    succeeds(runs.command(run_dir, *settings))
    mine, theirs = (tensors(each, 5) for each in (run_dir, uninterrupted))
    assert_same_tensors(mine, theirs)


def test_a_disk_that_is_full_for_a_while(
    runs: Runs, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run folder: records of the meantime are lost, with one warning at either end."""
    filler, step = small_disk / "filler", GlobalStep.__call__

    def fill_meanwhile(self: GlobalStep, reader: PlanReader, lr: float) -> StepResult:
        done = reader.samples_consumed // self.recipe.rows_per_step
        if done == 10:
            fill(filler)
        if done == 30:
            filler.unlink()
        return step(self, reader, lr)

    monkeypatch.setattr(GlobalStep, "__call__", fill_meanwhile)
    settings = ["train.steps=32", "train.checkpoint.every=8", "train.checkpoint.on_error=continue"]
    run_dir = small_disk / "run"
    succeeds(runs.command(run_dir, *settings, "train.eval_every=100"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    steps = [record["step"] for record in records(run_dir, "train")]
    missing = sorted(set(range(1, 33)) - set(steps))
    assert missing and missing == list(range(missing[0], 31)) and missing[0] > 10
    assert warnings == [
        f"cannot write {run_dir}/metrics.jsonl: No space left on device; training goes on, and records are lost until "
        "there is room",
        f"{run_dir}/metrics.jsonl is written again; {len(missing)} records of the meantime are lost",
    ]
    assert committed(run_dir) == [8, 32]


def fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(4096))


def test_a_run_from_a_seed_checkpoint(
    runs: Runs, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = [*runs.command(tmp_path, *EVERY_STEP), "--seed-checkpoint"]
    assert main(seed) == 0
    assert capsys.readouterr().out == f"tiny: initial weights: {tmp_path}/checkpoints/step-00000000\n"
    assert (
        fails(capsys, seed, 2)
        == f"{tmp_path}/checkpoints has checkpoints already: a run starts from the newest of them"
    )
    other = fails(capsys, runs.command(tmp_path, *EVERY_STEP, "seed=7"), 2)
    assert other == (
        f"{tmp_path}/checkpoints/step-00000000 holds the initial weights of seed=0, and the recipe has seed=7: "
        "set seed=0, or write it anew in another run_dir"
    )
    succeeds(runs.command(tmp_path, *EVERY_STEP))
    assert_same_run(tmp_path, uninterrupted)


def test_a_seed_checkpoint_where_a_run_trains(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*runs.command(tmp_path), "--seed-checkpoint"]
    with locked(tmp_path, World.alone(torch.device("cpu"))):
        assert fails(capsys, command, 2).startswith(f"another process is training in {tmp_path}: ")
        assert committed(tmp_path) == []
    succeeds(command)
    assert committed(tmp_path) == [0]


def test_a_seed_checkpoint_is_not_written_in_a_dry_run(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*runs.command(tmp_path / "run"), "--seed-checkpoint", "--dry-run"]
    assert "argument --dry-run: not allowed with argument --seed-checkpoint" in fails(capsys, command, 2)
    assert not (tmp_path / "run").exists()
