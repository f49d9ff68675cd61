"""kill -9 of one rank or of all at any moment: the same command goes on, on this number of processes or on another."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slotmamba.checkpoint.manifest import read_manifest
from tests.distributed.ranks import Job, Launcher
from tests.train.runs import (
    assert_same_tensors,
    checkpoint,
    committed,
    records,
    tensors,
)

EVERY = 3  # steps between checkpoints
SETTINGS = [f"train.checkpoint.every={EVERY}", "train.eval_every=50", "train.global_batch_tokens=288"]
ROWS = 12  # of a step
# With the default of 1e-8 Adam makes whole updates of what rounding leaves of gradients near zero.
EPS = "optim.eps=1.0e-6"
SINGLE = ["parallel.engine=single", "parallel.shard=1", "train.micro_batch=1"]


def on(size: int) -> list[str]:
    return [f"parallel.shard={size}", "train.micro_batch=1"]


MOMENTS = ("save", "rename", "step", "start")


def spread(kills: int, steps: int, generator: random.Random) -> list[tuple[int, str]]:
    """For each kill the step after which it comes, over the whole run, and what is to be hit: all of them as often.

    The last steps are left out, so that a save after every one of the steps is still to come.
    """
    span = (steps - 2 * EVERY) / kills
    after = [int(span * (number + generator.random())) for number in range(kills)]
    hit = [MOMENTS[number % len(MOMENTS)] for number in range(kills)]
    generator.shuffle(hit)
    return list(zip(after, hit, strict=True))


def kill_at_a_random_moment(job: Job, after: int, hit: str, generator: random.Random) -> None:
    """Kill one rank or all once a step is done, and one more than ever before: then, in the next save, or when its
    folder gets its name; or when they have just started, whatever is done."""
    # Whoever waits for one that dies before it has joined waits five minutes, if no launcher ends it.
    one = hit != "start" and generator.random() < 0.5
    victims = [generator.choice(job.ranks)] if one else job.ranks
    folder, after = job.run_dir / "checkpoints", max(after, job.steps() + 1)

    def wait_until(happened: Callable[[], object]) -> None:
        end = time.monotonic() + 120
        while not happened() and any(rank.poll() is None for rank in job.ranks) and time.monotonic() < end:
            time.sleep(0.001)

    if hit == "start":
        time.sleep(generator.uniform(0, 1.5))
    else:
        wait_until(lambda: job.steps() >= after)
    seen = set(folder.glob("*"))
    if hit in ("save", "rename"):
        wait_until(lambda: set(folder.glob(".tmp-*" if hit == "save" else "step-*")) - seen)
    time.sleep(generator.uniform(0, 0.02))
    for rank in victims:
        rank.send(signal.SIGKILL)


def rows_by_step(attempts: list[Path]) -> dict[int, list[int]]:
    """The rows that the last attempt at each step has trained on, all ranks together, by the position before."""
    found: dict[int, list[int]] = {}
    for attempt in attempts:
        of_attempt: dict[int, list[int]] = {}
        for file in sorted(attempt.iterdir()):
            for line in file.read_text().splitlines():
                position, *rows = json.loads(line)
                of_attempt.setdefault(position, []).extend(rows)
        found |= of_attempt
    return found


def assert_every_row_once(attempts: list[Path], steps: int) -> None:
    found = rows_by_step(attempts)
    assert sorted(found) == list(range(0, steps * ROWS, ROWS))
    consumed = [row for position in sorted(found) for row in sorted(found[position])]
    assert consumed == list(range(steps * ROWS))


def check_kills(launcher: Launcher, folder: Path, kills: int, steps: int) -> None:
    seed = int(os.environ.get("TEST_SEED") or secrets.randbits(32))
    print(f"TEST_SEED={seed}")
    generator = random.Random(seed)
    moments = spread(kills, steps, generator)
    settings = [*on(2), *SETTINGS, f"train.steps={steps}"]
    assert launcher.start(folder / "uninterrupted", *settings).wait(seconds=600) == [0, 0]

    run_dir, attempts, killed_at, resumed_from = folder / "run", [], [], 0
    for number in range(kills + 1):
        attempts.append(folder / f"rows {number}")
        attempts[-1].mkdir()
        background = generator.random() < 0.5
        job = launcher.start(run_dir, *settings, f"train.checkpoint.async={str(background).lower()}", rows=attempts[-1])
        if number < kills:
            kill_at_a_random_moment(job, *moments[number], generator)
        codes = job.wait(seconds=600)
        resumed = re.search(r"resumes after step (\d+) ", job.out)
        if resumed:
            assert int(resumed[1]) >= resumed_from, "a checkpoint that was there before is not any more"
            resumed_from = int(resumed[1])
        if number == kills:
            assert codes == [0, 0], job.err
            break
        killed_at.append(job.steps())
        assert 0 not in codes, "a rank that goes on alone, or a run that ends before its last kill"
        assert job.steps() - max(committed(run_dir), default=0) <= 2 * EVERY, "more is lost than one checkpoint"
    print(f"killed after steps {killed_at} of {steps}, resumed last after step {resumed_from}")
    assert resumed_from >= steps // 4
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert_every_row_once(attempts, steps)
    assert_same_records(run_dir, folder / "uninterrupted")


def assert_same_records(run_dir: Path, uninterrupted: Path) -> None:
    """As `assert_same_run`, but for the notes that train.checkpoint.async was changed."""
    mine = [record for record in records(run_dir) if record["kind"] != "recipe"]
    assert mine == records(uninterrupted)
    last = committed(uninterrupted)[-1]
    assert_same_tensors(tensors(run_dir, last), tensors(uninterrupted, last))
    assert read_manifest(checkpoint(run_dir, last)).updates == last


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_five_times(launcher: Launcher, tmp_path: Path) -> None:
    check_kills(launcher, tmp_path, kills=5, steps=24)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_thirty_times(launcher: Launcher, tmp_path: Path) -> None:
    check_kills(launcher, tmp_path, kills=30, steps=200)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_saved_on_four_resumed_on_three_two_and_one(launcher: Launcher, tmp_path: Path) -> None:
    """Killed on each number of processes; the losses are those of one process to 1e-4, every row is consumed once."""
    expected = tmp_path / "one"
    job = launcher.start(expected, *SINGLE, *SETTINGS, EPS, "train.steps=12", size=1)
    assert job.wait() == [0], job.err
    run_dir, attempts = tmp_path / "run", []
    for end, size in ((3, 4), (6, 3), (9, 2), (12, 1)):
        attempts.append(tmp_path / f"rows {size} {end}")
        attempts[-1].mkdir()
        layout = SINGLE if size == 1 else on(size)
        # Killed after two steps more than the checkpoint of step `end` has; the last one ends by itself.
        fault = "kill:*:6" if end < 12 else ""
        job = launcher.start(
            run_dir, *layout, *SETTINGS, EPS, "train.steps=12", size=size, rows=attempts[-1], inject=fault
        )
        codes = job.wait()
        assert (codes == [0] * size) == (end == 12), job.err
        assert end == 3 or f"resumes after step {end - 3} (row {(end - 3) * ROWS})" in job.out
        assert committed(run_dir)[-1] == end
    assert_every_row_once(attempts, 12)
    mine, theirs = ([record for record in records(each, "train")] for each in (run_dir, expected))
    assert [record["step"] for record in mine] == list(range(1, 13))
    for ours, others in zip(mine, theirs, strict=True):
        assert ours["loss"] == pytest.approx(others["loss"], rel=1e-4)
        assert (ours["lr"], ours["tokens"]) == (others["lr"], others["tokens"])
