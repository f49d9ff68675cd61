"""A rank that fails, dies or hangs ends all of them, with one line on the terminal and the rest in logs/."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.distributed.ranks import Launcher

pytestmark = [pytest.mark.timeout(200), pytest.mark.slow]

# Short enough for a test, long enough for a busy machine.
TIMEOUTS = ["parallel.first_step_timeout=60s", "parallel.step_timeout=10s"]


def test_a_bug_on_one_rank(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, inject="bug:1:3")
    assert job.wait() == [1, 1]
    logs = tmp_path / "logs"
    assert job.errors() == [
        f"rank 1: ZeroDivisionError: a bug; traceback: {logs}/rank-00001.log, stacks of all ranks: {logs}/stacks-*.txt"
    ]
    assert "Traceback" in job.log(1) and "in bug" in job.log(1)
    assert "Traceback" not in job.err
    assert "the job ends: rank 1: ZeroDivisionError: a bug" in job.log(0)
    assert "all_reduce" in job.stacks(0)


def test_bad_input_on_one_rank(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, inject="bad_input:1:2")
    assert job.wait() == [2, 2]
    assert job.errors() == ["rank 1: the shards of this rank are not there"]


def test_bad_input_on_all_ranks(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, "train.device=cpu", inject="bad_input:*:1")
    assert job.wait() == [2, 2]
    assert job.errors() == ["the shards of this rank are not there"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed(launcher: Launcher, tmp_path: Path, victim: int) -> None:
    job = launcher.start(tmp_path, inject=f"kill:{victim}:3")
    codes = job.wait()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    (error,) = job.errors()
    assert error.startswith(f"rank {victim} has ended without a word (killed? out of memory?)")
    assert f"{tmp_path}/logs/stacks-*.txt" in error
    assert "Thread" in job.stacks(1 - victim)


def test_a_rank_that_crashes(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, inject="crash:1:3")
    assert job.wait() == [1, -signal.SIGABRT]
    (error,) = job.errors()
    assert error.startswith("rank 1 has ended without a word")
    assert "Fatal Python error: Aborted" in job.stacks(1) and "in crash" in job.stacks(1)


def test_a_rank_that_leaves(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, inject="leave:1:2")
    assert job.wait() == [1, 0]
    (error,) = job.errors()
    assert error.startswith("rank 1 has ended without a word")


def test_a_rank_that_hangs(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, *TIMEOUTS, inject="hang:1:3")
    assert job.wait() == [1, 1]
    (error,) = job.errors()
    assert re.match(r"no step for 10 s: rank 1 is behind: step 2, training \(process \d+ on \S+\); stacks", error)
    assert "in hang" in job.stacks(1)
    assert "in hang" not in job.stacks(0)


def test_a_rank_that_is_stopped(launcher: Launcher, tmp_path: Path) -> None:
    """It cannot say where it is; all others end, and it does once it goes on."""
    job = launcher.start(tmp_path, "train.steps=1000", *TIMEOUTS, inject="slow:*:*")
    job.until(lambda: job.steps() > 2)
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    assert job.wait([0]) == [1]
    (error,) = job.errors()
    assert error.startswith("no step for 10 s: rank 1 does not answer (stopped?): step ")
    os.kill(job.ranks[1].pid, signal.SIGCONT)
    assert job.wait() == [1, 1]


@pytest.mark.parametrize("fault", ["kill", "bug"])
def test_under_torchrun(launcher: Launcher, tmp_path: Path, fault: str) -> None:
    job = launcher.torchrun(tmp_path, inject=f"{fault}:1:3")
    assert job.wait() == [1]
    (error,) = job.errors()
    assert error.startswith("rank 1")
