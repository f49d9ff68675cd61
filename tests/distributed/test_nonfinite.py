"""A loss or gradient that is not finite on one rank: all ranks stop, or all skip the step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Job, Launcher
from tests.train.runs import committed, records, tensors

pytestmark = [pytest.mark.timeout(200), pytest.mark.slow]


def skipped(job: Job) -> list[int]:
    return [record["step"] for record in records(job.run_dir, "train") if record["skipped"]]


@pytest.mark.parametrize("fault", ["loss-nan", "gradient-nan"])
def test_all_stop(launcher: Launcher, tmp_path: Path, fault: str) -> None:
    job = launcher.start(tmp_path, inject=f"{fault}:1:3")
    assert job.wait() == [1, 1]
    (error,) = job.errors()
    assert error.startswith("step 3: loss ") and error.endswith("or set train.on_nonfinite=skip")
    assert "Traceback" not in job.err


@pytest.mark.parametrize("fault", ["loss-nan", "gradient-nan"])
def test_all_skip(launcher: Launcher, tmp_path: Path, fault: str) -> None:
    job = launcher.start(tmp_path, "train.on_nonfinite=skip", inject=f"{fault}:1:3")
    assert job.wait() == [0, 0], job.err
    assert skipped(job) == [3]
    assert committed(tmp_path) == [6]
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path, 6).values())


def test_the_cap_on_skips(launcher: Launcher, tmp_path: Path) -> None:
    job = launcher.start(tmp_path, "train.on_nonfinite=skip", "train.max_skips=2", inject="loss-nan:1:*")
    assert job.wait() == [1, 1]
    assert job.errors()[-1].endswith("2 steps in a row were skipped (train.max_skips)")
    assert skipped(job) == [1]
