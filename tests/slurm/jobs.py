"""Jobs of mqar-tiny, made small: two processes, 24 steps of two rows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slotmamba.metrics import read_metrics
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.history import read_history

SMALL = ["train.device=cpu", "train.steps=24", "train.global_batch_tokens=256", "train.micro_batch=1", "optim.warmup=2"]
SMALL += ["train.log_every=1", "train.eval_every=100", "train.eval_rows=2", "train.checkpoint.every=100"]
# What a user may have in the environment and nobody else may know.
SECRETS = {
    name: f"hunter2-of-{name.lower()}"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DATABASE_PASSWORD")
}
TWO = ["parallel.engine=fsdp2", "parallel.shard=2"]


def arguments(run_dir: Path, *more: str) -> list[str]:
    return ["mqar-tiny", f"run_dir={run_dir}", *SMALL, *more]


def cli(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slotmamba.cli", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # which the processes of a local job are in too
    )


def succeeds(process: subprocess.Popen[str], seconds: float = 180) -> str:
    """What the command printed."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


@contextmanager
def ended_with_the_test(process: subprocess.Popen[str]) -> Iterator[None]:
    """Where the test fails, ends all processes of a job on this machine."""
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def submitted(cluster: SlurmCluster, run_dir: Path, *more: str, **variables: str) -> str:
    """Submits two processes on two nodes; the number of the job."""
    command = cli(
        "submit", *arguments(run_dir, *TWO, "slurm.nodes=2", *more), SLURM_CONF=str(cluster.conf), **variables
    )
    found = re.match(r"mqar-tiny: job (\d+) on 2 nodes: 2 processes\n", succeeds(command))
    assert found
    return found[1]


def output(run_dir: Path, job: str, rank: int = 0) -> str:
    return (run_dir / "slurm" / f"{job}_{rank}_log.out").read_text()


def step(run_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    steps = [record["step"] for record in read_metrics(path)] if path.exists() else []
    return max(steps, default=0)


def until(happened: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def completed(cluster: SlurmCluster, run_dir: Path, job: str, seconds: float = 180) -> None:
    found = cluster.wait_for_job(job, seconds=seconds)
    assert found["JobState"] == "COMPLETED", output(run_dir, job)


def holds(folder: Path, text: str) -> list[Path]:
    """Files below `folder` with `text` in them."""
    return [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if text.encode() in (Path(parent) / name).read_bytes()
    ]


def trainers(run_dir: Path) -> dict[int, int]:
    """The process number, as outside of its node, of each rank that trains."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"train" in command and any(part.startswith(bytes(run_dir / "slurm")) for part in command):
            ranks = [int(each[5:]) for each in variables if each.startswith(b"RANK=")]
            found[ranks[0] if ranks else 0] = int(process.name)
    return found


def tasks(run_dir: Path) -> dict[int, int]:
    """The process number, as outside of its node, of the task of each rank that trains."""
    parent = "\nPPid:\t"
    said = {rank: Path(f"/proc/{number}/status").read_text() for rank, number in trainers(run_dir).items()}
    return {rank: int(each.partition(parent)[2].split()[0]) for rank, each in said.items()}


def reasons(run_dir: Path) -> list[str | None]:
    """Of all starts, why they ended."""
    return [start.reason for start in read_history(run_dir)]
