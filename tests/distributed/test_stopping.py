"""A signal on one rank, or the time limit: all ranks stop at the same step, save, and the same command resumes."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from slotmamba.checkpoint.manifest import read_manifest
from tests.distributed.ranks import Job, Launcher
from tests.train.runs import checkpoint, committed, records

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def assert_saved(job: Job, reason: str) -> int:
    """Rank 0 alone has said so, in its last line; returns the step."""
    found = re.fullmatch(
        rf"{reason}: saved at step (?P<step>\d+) of \d+; the same command resumes: {re.escape(str(job.run_dir))}",
        job.out.splitlines()[-1],
    )
    assert found, job.out + job.err
    assert committed(job.run_dir)[-1] == int(found["step"])
    assert job.errors() == []
    return int(found["step"])


def assert_resumes(launcher: Launcher, run_dir: Path, step: int) -> None:
    job = launcher.start(run_dir, f"train.steps={step + 2}")
    assert job.wait() == [0, 0], job.err
    assert f"resumes after step {step} " in job.out or step == 0
    assert committed(run_dir)[-1] == step + 2


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_on_one_rank(launcher: Launcher, tmp_path: Path, number: signal.Signals) -> None:
    job = launcher.start(tmp_path, "train.steps=1000", inject="slow:*:*")
    job.until(lambda: job.steps() > 0)
    os.kill(job.ranks[1].pid, number)
    assert job.wait() == [0, 0], job.err
    step = assert_saved(job, f"{number.name} on rank 1")
    assert 1 <= step < 1000
    assert len(records(tmp_path, "train")) == step
    assert_resumes(launcher, tmp_path, step)


def test_before_the_first_step(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, inject="building-usr1:1:1")
    assert job.wait() == [0, 0], job.err
    assert assert_saved(job, "SIGUSR1 on rank 1") == 0


def test_in_validation(launcher: Launcher, tmp_path: Path) -> None:
    """All ranks leave it at the same batch, and make up for it when they resume."""
    settings = ["train.eval_every=3", "train.eval_rows=80"]
    job = launcher.start(tmp_path, *settings, inject="validation-usr1:1:2")
    assert job.wait() == [0, 0], job.err
    assert assert_saved(job, "SIGUSR1 on rank 1") == 3
    assert records(tmp_path, "validation") == []
    assert read_manifest(checkpoint(tmp_path, 3)).progress["validation_due"]
    job = launcher.start(tmp_path, *settings)
    assert job.wait() == [0, 0], job.err
    assert [record["step"] for record in records(tmp_path, "validation")] == [3, 6]


def test_the_time_limit(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, "train.steps=100000", "train.time_limit=8s", inject="slow:*:*")
    assert job.wait() == [0, 0], job.err
    assert_saved(job, r"train\.time_limit( on rank \d)?")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_under_torchrun(launcher: Launcher, tmp_path: Path, number: signal.Signals) -> None:
    """The terminal sends Ctrl-C to torchrun and to all ranks, and torchrun sends it on to them: twice is not enough to
    interrupt the save. torchrun's own exit code is then 1."""
    job = launcher.torchrun(tmp_path, "train.steps=1000", inject="slow:*:*")
    job.until(lambda: job.steps() > 0)
    os.killpg(job.ranks[0].pid, number)
    job.wait()
    step = assert_saved(job, rf"{number.name}( on rank \d)?")
    assert_resumes(launcher, tmp_path, step)
