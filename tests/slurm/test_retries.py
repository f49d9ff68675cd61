"""Training that fails is tried again, in the same job or in the next one of a chain, but not for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.history import read_history
from slotmamba_slurm.jobs import submitted_jobs
from tests.slurm.jobs import (
    arguments,
    cli,
    completed,
    ended_with_the_test,
    output,
    reasons,
    step,
    submitted,
    succeeds,
    trainers,
    until,
)
from tests.train.runs import assert_same_tensors, committed, fails, records, tensors

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

MISSING_DATA = "data.sources=[{name: text, shards: nowhere}]"
NEVER_FINITE = ["optim.lr=1e30", "optim.warmup=1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    assert main(["train", *arguments(run_dir)]) == 0
    return run_dir


def test_progress_renews_the_budget(tmp_path: Path, alone: Path) -> None:
    """Killed twice, each time after a checkpoint more, with one retry: it goes on to the same weights."""
    process = cli("submit", *arguments(tmp_path, "cluster=local", "slurm.max_retries=1", "train.checkpoint.every=4"))
    with ended_with_the_test(process):
        for number in (1, 2):
            kill_after_a_checkpoint(tmp_path, number)
        succeeds(process)
    assert reasons(tmp_path) == ["training failed (SIGKILL)"] * 2 + ["finished"]
    (job,) = submitted_jobs(tmp_path)
    assert (job.cluster, job.submission) == ("local", "submission-001")
    assert output(tmp_path, job.job).count("training failed (SIGKILL): retry 1 of 1\n") == 2
    assert_same_tensors(tensors(tmp_path, 24), tensors(alone, 24))


def kill_after_a_checkpoint(run_dir: Path, start: int) -> None:
    """Kills training in its start of that number, from 1, once that has committed a checkpoint."""
    until(lambda: len(read_history(run_dir)) == start)
    saved = committed(run_dir)
    until(lambda: committed(run_dir) > saved)
    os.kill(trainers(run_dir)[0], signal.SIGKILL)


def test_no_progress_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the cause in one line, however often it was said. What fails counts from when it was submitted."""
    for retries, times in ((1, "2nd"), (0, "1st")):
        settings = [*NEVER_FINITE, "cluster=local", f"slurm.max_retries={retries}"]
        said = fails(capsys, ["submit", *arguments(tmp_path, *settings)], code=1)
        assert said.startswith("step ") and "the weights were not changed" in said
        assert output(tmp_path, submitted_jobs(tmp_path)[-1].job).endswith(
            f": training failed (exit code 1), for the {times} time without a new checkpoint: not tried again "
            f"(slurm.max_retries={retries})\n"
        )
    assert reasons(tmp_path) == ["training failed (exit code 1)"] * 3


def test_a_local_job_starts_as_often_as_it_asks_for_it(tmp_path: Path) -> None:
    """submitit's own controller gives up after six starts."""
    count = tmp_path / "starts"
    task = f"echo >> {count}; [ $(wc -l < {count}) = 9 ] || exit 144"
    variables = {"SUBMITIT_LOCAL_COMMAND": f"sh -c '{task}'", "SUBMITIT_LOCAL_NTASKS": "1"}
    variables |= {"SUBMITIT_LOCAL_TIMEOUT_S": "60", "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "1"}
    variables |= {"SUBMITIT_STDERR_TO_STDOUT": "1", "SUBMITIT_LOCAL_WITH_SHELL": ""}
    controller = [sys.executable, "-m", "slotmamba_slurm.controller", str(tmp_path)]
    subprocess.run(controller, env=os.environ | variables, check=True, timeout=60)
    assert count.read_text().count("\n") == 9


def test_a_chain(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    """Where jobs are not queued again the next one goes on; those that are not needed are cancelled."""
    first = submitted(cluster, tmp_path, "slurm.requeue=false", "slurm.chain=3")
    jobs = [job.job for job in submitted_jobs(tmp_path)]
    assert jobs[0] == first and len(jobs) == 3
    until(lambda: step(tmp_path) >= 2)
    cluster.run("scancel", "--signal=USR2", first)
    completed(cluster, tmp_path, first)
    assert output(tmp_path, first).endswith(f": job {jobs[1]} of the chain goes on\n")
    completed(cluster, tmp_path, jobs[1])
    assert cluster.wait_for_job(jobs[2])["JobState"] == "CANCELLED"
    assert f"the rest of the chain is cancelled: {jobs[2]}\n" in output(tmp_path, jobs[1])
    assert [(start.job, start.reason) for start in read_history(tmp_path)] == [
        (first, "told to stop by SIGUSR2"),
        (jobs[1], "finished"),
    ]
    assert records(tmp_path, "train") == records(undisturbed, "train")
    assert_same_tensors(tensors(tmp_path, 24), tensors(undisturbed, 24))


@pytest.mark.parametrize(
    ("settings", "states"),
    [
        ([MISSING_DATA], ["FAILED", "CANCELLED", "CANCELLED"]),
        ([*NEVER_FINITE, "slurm.max_retries=1"], ["FAILED", "FAILED", "CANCELLED"]),
    ],
)
def test_a_chain_ends_with_its_budget(
    settings: list[str], states: list[str], cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["submit", *arguments(tmp_path, *settings, "slurm.requeue=false", "slurm.chain=3")]) == 0
    jobs = [job.job for job in submitted_jobs(tmp_path)]
    assert [cluster.wait_for_job(job)["JobState"] for job in jobs] == states


def test_a_chain_that_cannot_be_submitted(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, ["submit", *arguments(tmp_path, "slurm.chain=2")], code=2)
    assert said.endswith("slurm: chain=2 is for jobs that are not queued again: set requeue=false")
    assert not (tmp_path / "slurm").exists()
