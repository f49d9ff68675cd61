"""`slotmamba submit` on a real Slurm of this machine, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba.environment import git_state
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.jobs import submitted_jobs
from tests.slurm.events import trains
from tests.slurm.jobs import (
    SECRETS,
    TWO,
    arguments,
    cli,
    completed,
    ended_with_the_test,
    holds,
    output,
    reasons,
    step,
    submitted,
    succeeds,
    until,
)
from tests.train.runs import assert_same_tensors, committed, fails, records, tensors

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    assert main(["train", *arguments(run_dir)]) == 0
    return run_dir


@dataclass(frozen=True)
class Requeued:
    """A job, and the steps after which it was stopped."""

    run_dir: Path
    job: str
    first: int
    second: int


def requeued(cluster: SlurmCluster, run_dir: Path) -> Requeued:
    """A job on two nodes, stopped by SIGUSR2, as before the time limit, and by SIGTERM, as by an operator's requeue or
    a preemption."""
    job = submitted(cluster, run_dir, **SECRETS)
    until(lambda: step(run_dir) >= 2)
    cluster.run("scancel", "--signal=USR2", job)
    until(lambda: f"job {job} is queued again\n" in output(run_dir, job))
    (first,) = committed(run_dir)
    until(lambda: step(run_dir) >= first + 2)
    cluster.run("scontrol", "requeue", job)
    until(lambda: committed(run_dir)[-1] > first)
    second = committed(run_dir)[-1]
    completed(cluster, run_dir, job)
    return Requeued(run_dir, job, first, second)


def test_two_nodes(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path, alone: Path) -> None:
    """One test, so that one worker has the job."""
    job = requeued(cluster, tmp_path)
    assert cluster.job(job.job)["Restarts"] == "2"
    assert reasons(tmp_path) == ["told to stop by SIGUSR2", "requeued by an operator", "finished"]
    assert_resumed(job, undisturbed)
    assert_trained_as_one_process(tmp_path, alone)
    assert_record(tmp_path, job.job)


def assert_resumed(job: Requeued, undisturbed: Path) -> None:
    """The job goes on from where it was, every time, to the same weights."""
    first, second, said = job.first, job.second, output(job.run_dir, job.job)
    assert 2 <= first < second < 24
    for reason, stopped in (("SIGUSR2", first), ("SIGTERM", second)):
        assert f"{reason}: saved at step {stopped} of 24" in said
        assert f"mqar-tiny: resumes after step {stopped} " in said
    assert records(job.run_dir, "train") == records(undisturbed, "train")
    assert_same_tensors(tensors(job.run_dir, 24), tensors(undisturbed, 24))


def assert_trained_as_one_process(run_dir: Path, alone: Path) -> None:
    one, two = (records(folder, "train") for folder in (alone, run_dir))
    assert [record["step"] for record in two] == list(range(1, 25))
    # Float32 sums in another order, which 24 steps carry on.
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-4)


def assert_record(run_dir: Path, job: str) -> None:
    """It ran on two nodes, from the copy of the code; what was in the environment is nowhere."""
    for rank in (0, 1):
        assert f"hostname=node{rank + 1}, " in output(run_dir, job, rank)
        assert f": rendezvous at node1:{20000 + int(job) % 10000}\n" in output(run_dir, job, rank)
    submission = run_dir / "slurm" / "submission-001"
    assert (submission / "code" / "slotmamba" / "recipes" / "mqar-tiny.yaml").is_file()
    assert f"env PYTHONPATH={submission / 'code'}" in (run_dir / "slurm" / f"{job}_submission.sh").read_text()
    assert json.loads((run_dir / "environment.json").read_text())["git"] == git_state()
    assert holds(run_dir, "hunter2") == []


def test_two_nodes_under_zero_2(cluster: SlurmCluster, tmp_path: Path, alone: Path) -> None:
    zero = ["slurm.nodes=2", "parallel.engine=deepspeed", "parallel.zero_stage=2"]
    out = succeeds(cli("submit", *arguments(tmp_path, *zero)))
    found = re.search(r"^mqar-tiny: job (\d+) on 2 nodes: 2 processes$", out, re.MULTILINE)
    assert found, out
    completed(cluster, tmp_path, found[1])
    assert_trained_as_one_process(tmp_path, alone)


def test_not_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Whether the recipe forbids it, as in test_retries, or someone does later, or wants the job to end."""
    forbidden, ended = tmp_path / "forbidden", tmp_path / "ended"
    jobs = {run_dir: submitted(cluster, run_dir, "train.steps=1000") for run_dir in (forbidden, ended)}
    cluster.run("scontrol", "update", f"job={jobs[forbidden]}", "requeue=0")
    for run_dir, sent in ((forbidden, "USR2"), (ended, "INT")):
        until(partial(trains, run_dir, 0, steps=1))
        cluster.run("scancel", f"--signal={sent}", jobs[run_dir])
        completed(cluster, run_dir, jobs[run_dir])
        assert reasons(run_dir) == [f"told to stop by SIG{sent}"]
        assert len(committed(run_dir)) == 1
    told = f"job {jobs[forbidden]} is not queued again; submit it again to resume\n"
    assert told in output(forbidden, jobs[forbidden])


def test_a_local_job_starts_again(alone: Path, tmp_path: Path) -> None:
    """The same path without Slurm: stopped by SIGTERM, started again by submitit, to the same weights."""
    process = cli("submit", *arguments(tmp_path, "cluster=local"))
    with ended_with_the_test(process):
        until(lambda: step(tmp_path) >= 2)
        (job,) = (each.job for each in submitted_jobs(tmp_path))
        os.kill(int(job), signal.SIGTERM)
        assert succeeds(process).startswith(f"mqar-tiny: job {job} on this machine: 1 process\n")
    assert reasons(tmp_path) == ["told to stop by SIGTERM", "finished"]
    assert "stopped by SIGTERM, training ended with exit code 0" in output(tmp_path, job)
    assert "mqar-tiny: resumes after step " in output(tmp_path, job)
    assert_same_tensors(tensors(tmp_path, 24), tensors(alone, 24))


def test_a_local_job_is_interrupted(tmp_path: Path) -> None:
    """As Ctrl-C does it: saved, not started again, no failure."""
    process = cli("submit", *arguments(tmp_path, "train.steps=1000", "cluster=local"))
    with ended_with_the_test(process):
        until(lambda: step(tmp_path) >= 2)
        os.killpg(process.pid, signal.SIGINT)
        assert "interrupted: waiting for the checkpoint\n" in succeeds(process)
    assert reasons(tmp_path) == ["told to stop by SIGINT"]
    assert len(committed(tmp_path)) == 1


def test_a_local_job_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    missing = "data.sources=[{name: text, shards: nowhere}]"
    said = fails(capsys, ["submit", *arguments(tmp_path, missing), "cluster=local"], code=1)
    assert said == "data.sources.0.shards: nowhere does not exist: build it with `slotmamba data build`"
    assert reasons(tmp_path) == ["training failed (exit code 2)"]
    assert holds(tmp_path, "nowhere") != [] and holds(tmp_path, "hunter2") == []


def test_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *arguments(tmp_path, "train.steps=2"), "cluster=debug"]) == 0
    assert f"mqar-tiny: finished 2 steps: {tmp_path}" in capsys.readouterr().out
    said = fails(capsys, ["submit", *arguments(tmp_path, *TWO), "cluster=debug"], code=2)
    assert said == "cluster=debug is one process, the recipe asks for 2: set cluster=local"


def test_dry_run(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["slurm.nodes=2", "slurm.time=90s", "slurm.signal_lead=30s", "slurm.memory_gb=1", "slurm.setup=[module list]"]
    assert main(["submit", *arguments(tmp_path / "run", *TWO, *job), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("name: mqar-tiny\n")
    for line in ("nodes=2", "ntasks-per-node=1", "time=2", "signal=USR2@30", "mem=1G", "requeue"):
        assert f"\n#SBATCH --{line}\n" in out
    assert "\n# setup\nmodule list\n" in out
    assert "memory of a process, one of 2 (fsdp2)" in out
    assert "using 2 processors on nodes node[1-2] in partition normal" in out.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "-h").stdout == ""


def test_dry_run_with_gpus(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *arguments(tmp_path / "run", *TWO, "slurm.gpus_per_node=2"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "\n#SBATCH --gpus-per-node=2\n" in out and "\n#SBATCH --ntasks-per-node=2\n" in out
    assert "#SBATCH --time" not in out  # the partition's default
    assert " GiB of each GPU; slurm.gpu, its type, would tell whether that is there\n" in out
    assert "using 2 processors on nodes node1 in partition normal" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["slurm.partition=big"], "the cluster refuses the job: invalid partition specified: big"),
        (["slurm.nodes=4", "parallel.shard=4", "train.global_batch_tokens=512"], "the cluster refuses the job: "),
        (["slurm.nodes=3"], "slurm.nodes=3: parallel.replicate * parallel.shard = 2 processes do not spread evenly"),
        (
            ["slurm.gpus_per_node=2", "slurm.nodes=2", "parallel.replicate=1"],
            "slurm.nodes * slurm.gpus_per_node = 2 * 2 = 4 GPUs, but ",
        ),
        (["slurm.time=1m"], "slurm.signal_lead=2m is not less than slurm.time=1m"),
        (["cluster=locl"], "cluster=locl: expected slurm, local, debug; did you mean local?"),
        (["cluster=local", "slurm.nodes=2"], "slurm.nodes=2: cluster=local is this machine alone: set slurm.nodes=1"),
    ],
)
def test_refused(
    settings: list[str], message: str, cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, ["submit", *arguments(tmp_path / "run", *TWO, *settings)], code=2)
    assert said.startswith(message)
    assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "-h").stdout == ""


def test_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = fails(capsys, ["submit", *arguments(tmp_path / "run")], code=2)
    assert said == "there is no srun on PATH: submit from a node of the cluster, or set cluster=local"
