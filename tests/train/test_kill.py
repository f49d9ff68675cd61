"""kill -9 at any moment: the same command goes on, and in the end the run is the one that was never killed."""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forking import Command
from tests.train.runs import Commands, Runs, assert_same_run, committed, records

EVERY = 2  # steps between checkpoints
SETTINGS = [f"train.checkpoint.every={EVERY}", "train.eval_every=5", "train.eval_rows=2"]


def kill_at_a_random_moment(command: Command, run_dir: Path, generator: random.Random, start_up: float) -> None:
    """Kill during a save, around a step, or within seconds of the start, which takes about `start_up` of them.

    It comes at the latest a few steps further, so that the run outlives all kills.
    """
    before = steps_recorded(run_dir)
    kind = generator.choice(("save", "step", "time"))
    if kind == "save":
        command.wait_until(lambda: list((run_dir / "checkpoints").glob(".tmp-*")))
        time.sleep(generator.uniform(0, 0.03))
    elif kind == "step":
        further = generator.randint(1, EVERY + 1)
        command.wait_until(lambda: steps_recorded(run_dir) - before >= further)
        time.sleep(generator.uniform(0, 0.1))
    else:
        end = time.monotonic() + generator.uniform(0, 0.7 + start_up)
        command.wait_until(lambda: time.monotonic() > end or steps_recorded(run_dir) - before > EVERY)
    command.send(signal.SIGKILL)


def steps_recorded(run_dir: Path) -> int:
    """The last step in metrics.jsonl; a torn line is none."""
    if not (run_dir / "metrics.jsonl").exists():
        return 0
    return max((record["step"] for record in records(run_dir, "train")), default=0)


def check_kills(
    runs: Runs,
    commands: Commands,
    start: Callable[[list[str]], Command],
    run_dir: Path,
    *,
    kills: int,
    steps: int,
    start_up: float,
) -> None:
    seed = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"TEST_SEED={seed}")
    generator = random.Random(seed)
    uninterrupted = run_dir.with_name("uninterrupted")
    settings = [*SETTINGS, f"train.steps={steps}"]
    assert commands.run(runs.command(uninterrupted, *settings)).code == 0

    resumed_from = 0
    for number in range(kills):
        command = start(runs.command(run_dir, *settings))
        kill_at_a_random_moment(command, run_dir, generator, start_up)
        assert command.wait() == -signal.SIGKILL, (number, command.out, command.err)
        assert command.err == ""
        resumed = re.search(r"resumes after step (\d+) ", command.out)
        if resumed:
            assert int(resumed[1]) >= resumed_from, "a checkpoint that was there before is not any more"
            resumed_from = int(resumed[1])
        newest = max(committed(run_dir), default=0)
        assert newest >= resumed_from
        assert steps_recorded(run_dir) - newest <= EVERY, "more than the steps since the last checkpoint are lost"
    print(f"killed {kills} times, resumed last after step {resumed_from} of {steps}")
    assert resumed_from > 0, "no process came to resume"

    command = start(runs.command(run_dir, *settings))
    assert command.wait() == 0, command.err
    assert f"finished {steps} steps" in command.out
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert_same_run(run_dir, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twenty_times(runs: Runs, commands: Commands, tmp_path: Path) -> None:
    check_kills(runs, commands, commands.start, tmp_path / "run", kills=20, steps=42, start_up=0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_sixty_times_as_a_user_starts_it(runs: Runs, commands: Commands, tmp_path: Path) -> None:
    check_kills(runs, commands, commands.start_anew, tmp_path / "run", kills=60, steps=170, start_up=6)
