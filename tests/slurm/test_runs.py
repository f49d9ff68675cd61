"""`slotmamba runs` on jobs of a real Slurm, and of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slotmamba import run_lock
from slotmamba.cli import main
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.history import read_history
from slotmamba_slurm.jobs import submitted_jobs
from tests.runs.commands import listed, said
from tests.slurm.jobs import arguments, cli, output, step, submitted, succeeds, until
from tests.train.runs import committed, fails

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

LONG = "train.steps=100000"


def the_run(capsys: pytest.CaptureFixture[str], run_dir: Path) -> tuple[str, str]:
    """State, and why."""
    (run,) = listed(capsys, run_dir).values()
    return run["state"], run["why"]


def filled(cluster: SlurmCluster) -> str:
    """A job that has all nodes."""
    fill = ["--parsable", "--output=/dev/null", "--nodes=3", "--exclusive", "--wrap=sleep 600"]
    number = str(cluster.run("sbatch", *fill).stdout.strip())
    cluster.wait_for_job(number, ("RUNNING",))
    return number


def test_from_queue_to_resubmission(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One job on two nodes: it waits, runs, is queued again, is stopped for good, and resumed by a chain of others,
    which are cancelled at once."""
    fill = filled(cluster)
    job = submitted(cluster, tmp_path, LONG)
    (waiting,) = listed(capsys, tmp_path).values()
    assert (waiting["state"], waiting["job"], waiting["step"], waiting["total"]) == ("queued", job, 0, 100000)
    assert waiting["why"] in ("Resources", "Priority", "")  # Slurm takes a moment for it
    follower = cli("runs", "logs", str(tmp_path), "--follow")
    try:
        cluster.run("scancel", fill)
        until(lambda: step(tmp_path) >= 2)
        (running,) = listed(capsys, tmp_path).values()
        assert (running["state"], running["nodes"], running["job"]) == ("running", "node[1-2]", job)
        assert running["step"] >= 2 and running["eta"] > 1
        cluster.run("scancel", "--signal=USR2", job)
        until(lambda: committed(tmp_path))
        (first,) = committed(tmp_path)
        until(lambda: step(tmp_path) >= first + 2)
        (restarted,) = listed(capsys, tmp_path).values()
        assert (restarted["restarts"], restarted["why"]) == (1, "restarted after: told to stop by SIGUSR2")
        stop(capsys, tmp_path, job)
        assert_stopped(cluster, tmp_path, job, capsys)
        followed = succeeds(follower)  # by itself, for the run has ended
    finally:
        follower.kill()
    assert_logs(tmp_path, job, first, followed, said(capsys, "logs", str(tmp_path))[0])
    starts = [rf"\n{number}      {job} .* node\[1-2\]: 2 processes  " for number in (1, 2)]
    shown = said(capsys, "show", str(tmp_path))[0]
    assert re.search(rf"{starts[0]}told to stop by SIGUSR2{starts[1]}slotmamba runs stop\n", shown), shown
    last = committed(tmp_path)[-1]
    again = submitted(cluster, tmp_path, LONG, "slurm.chain=2", "slurm.requeue=false")
    until(lambda: step(tmp_path) > last)
    assert f"mqar-tiny: resumes after step {last} " in output(tmp_path, again)
    both = [again, str(int(again) + 1)]
    out = said(capsys, "stop", str(tmp_path), "--now")[0]
    assert out == f"{tmp_path}: cancelling job {both[0]} (RUNNING), job {both[1]} (PENDING)\n"
    assert [cluster.wait_for_job(job)["JobState"] for job in both] == ["CANCELLED"] * 2


def stop(capsys: pytest.CaptureFixture[str], run_dir: Path, job: str) -> None:
    lines = said(capsys, "stop", str(run_dir))[0].splitlines()
    assert lines[0] == f"{run_dir}: stopping job {job} (RUNNING)"
    assert lines[-1] == (
        f"{run_dir}: stopped, the newest checkpoint is of step {committed(run_dir)[-1]}; "
        "the same recipe, submitted or trained again, resumes"
    )


def assert_stopped(cluster: SlurmCluster, run_dir: Path, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The job is over, with a checkpoint of its last step, and does not come again."""
    assert the_run(capsys, run_dir) == ("stopped", "slotmamba runs stop")
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"], found["Requeue"]) == ("COMPLETED", "1", "0")
    assert committed(run_dir)[-1] == step(run_dir)
    assert cluster.run("scontrol", "requeue", job, check=False).returncode == 1


def assert_logs(run_dir: Path, job: str, first: int, followed: str, merged: str) -> None:
    """Both ranks and both starts, in the order of time, and whoever followed has seen the same."""
    assert sorted(followed.splitlines()) == sorted(merged.splitlines())
    marks = [
        r"\[0\] .*: rendezvous at node1:",
        r"\[0\] .* INFO slotmamba.faults.logs: rank 0 of 2: process \d+ on node1",
        r"\[0\] .*: step 1/100000 ",
        rf"\[0\] .*: SIGUSR2: saved at step {first} of 100000;",
        rf"\[0\] .*job {job} is queued again",
        r"\[0\] .* INFO slotmamba.faults.logs: rank 0 of 2: process \d+ on node1",
        rf"\[0\] .* mqar-tiny: resumes after step {first} ",
        rf"\[0\] .*: step {first + 1}/100000 ",
        r"\[0\] .* slotmamba_slurm.task: stopped by SIGUSR2, training ended with exit code 0",
    ]
    assert re.search(".*".join(marks), merged, re.DOTALL), merged
    assert (
        len(re.findall(r"^\[1\] .* INFO slotmamba.faults.logs: rank 1 of 2: process \d+ on node2$", merged, re.M)) == 2
    )
    times = re.findall(r"^\[\d\] (\d{4}-\S+ \S+) [A-Z]+ ", merged, re.M)
    assert len(times) > 10 and times == sorted(times)


def test_submitted_twice(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused while a job of the run waits; not once it has ended."""
    filled(cluster)
    job = submitted(cluster, tmp_path)
    said = fails(capsys, ["submit", *arguments(tmp_path)], code=2)
    stop = f"`slotmamba runs stop {tmp_path}` ends it"
    assert said == f"job {job} of this run is in the queue already (PENDING): {stop}"
    assert [each.job for each in submitted_jobs(tmp_path)] == [job]
    cluster.run("scancel", job)
    submitted(cluster, tmp_path)


def test_another_process_trains_there(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job fails; the run goes on as before."""
    assert main(["train", *arguments(tmp_path, "train.steps=2")]) == 0
    with (tmp_path / run_lock.NAME).open("a") as lock:
        assert run_lock.take(lock)
        job = submitted(cluster, tmp_path, "train.steps=2")
        assert cluster.wait_for_job(job, seconds=120)["JobState"] == "FAILED"
        capsys.readouterr()
        assert the_run(capsys, tmp_path) == ("running", "")
    assert f"another job trains here: job {job} is not queued again\n" in output(tmp_path, job)
    (start,) = read_history(tmp_path)
    assert (start.ended, start.reason) == ("stopped", "another job trains here")
    assert the_run(capsys, tmp_path) == ("finished", "")


def test_stopped_while_it_waits(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(cluster)
    job = submitted(cluster, tmp_path)
    out, _ = said(capsys, "stop", str(tmp_path))
    assert out.startswith(f"{tmp_path}: stopping job {job} (PENDING)\n")
    assert out.endswith(f"{tmp_path}: ended before training began, no checkpoint\n")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert the_run(capsys, tmp_path) == ("cancelled", f"job {job} CANCELLED before training began")


def test_jobs_that_fail(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    jobs = [
        submitted(cluster, early, "slurm.setup=[exit 3]"),
        submitted(cluster, late, "optim.lr=1e30", "optim.clip_norm=1e30", "slurm.max_retries=0"),
    ]
    for job in jobs:
        assert cluster.wait_for_job(job, seconds=90)["JobState"] == "FAILED"
    found = listed(capsys, tmp_path)
    assert (found["early"]["state"], found["early"]["why"]) == ("failed", f"job {jobs[0]} FAILED before training began")
    assert found["late"]["state"] == "failed" and re.search(r"step \d+: loss ", found["late"]["why"])
    assert found["late"]["nodes"] == "node[1-2]"


def test_a_job_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With cluster=local, a stopped job would start again."""
    # The time limit is for a test that fails, which would leave the job behind.
    command = ["submit", *arguments(tmp_path, "cluster=local", LONG, "train.time_limit=2m")]
    process = cli(*command)
    try:
        until(lambda: step(tmp_path) >= 2)
        (run,) = listed(capsys, tmp_path).values()
        assert run["state"] == "running"
        out, _ = said(capsys, "stop", str(tmp_path))
        assert re.match(rf"{tmp_path}: stopping job \d+ on this machine\n", out)
        (saved,) = committed(tmp_path)
        assert f": stopped, the newest checkpoint is of step {saved}; " in out
        succeeds(process)
    finally:
        process.kill()
    assert the_run(capsys, tmp_path)[0] == "stopped"
    assert main(["submit", *arguments(tmp_path, "cluster=local", f"train.steps={saved + 2}")]) == 0
    (run,) = listed(capsys, tmp_path).values()
    assert (run["state"], run["step"], run["restarts"]) == ("finished", saved + 2, 1)


def test_a_suspended_job(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left as it is, or cancelled."""
    job = submitted(cluster, tmp_path, LONG)
    until(lambda: step(tmp_path) >= 1)
    cluster.run("scontrol", "suspend", job)
    capsys.readouterr()
    assert main(["runs", "stop", str(tmp_path)]) == 2
    said_of_it = (
        f"error: job {job} is suspended and cannot save, so nothing was stopped: `scontrol resume {job}` first, "
    )
    err = capsys.readouterr().err
    assert err.startswith(said_of_it) and err.count("\n") == 1
    assert cluster.job(job)["Requeue"] == "1" and not list(tmp_path.glob("slurm/submission-*/*.stop"))
    assert said(capsys, "stop", str(tmp_path), "--now")[0] == f"{tmp_path}: cancelling job {job} (SUSPENDED)\n"
    assert cluster.wait_for_job(job)["JobState"] == "CANCELLED"


def test_what_was_saved_before_its_job_was_cancelled(
    cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next job of a chain, and one that is held after it was queued again: the run is stopped, and resumes."""
    chain, held = tmp_path / "chain", tmp_path / "held"
    first = submitted(cluster, chain, LONG, "slurm.chain=2", "slurm.requeue=false")
    until(lambda: step(chain) >= 1)
    out = said(capsys, "stop", str(chain))[0]
    assert f"stopping job {first} (RUNNING), job {int(first) + 1} (PENDING)\n" in out
    assert f"{chain}: stopped, " in out
    job = submitted(cluster, held, LONG)
    until(lambda: step(held) >= 1)
    cluster.run("scontrol", "requeuehold", job)
    cluster.wait_for_job(job, ("REQUEUE_HOLD", "PENDING"), seconds=60)
    assert f"{held}: stopped, the newest checkpoint is of step " in said(capsys, "stop", str(held))[0]
    cluster.wait_for_job(job, ("CANCELLED",))
    assert {name: run["state"] for name, run in listed(capsys, tmp_path).items()} == {
        "chain": "stopped",
        "held": "stopped",
    }
