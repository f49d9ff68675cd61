"""Jobs of mqar-tiny, made small: two processes, 24 steps of two rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from slotmamba.metrics import read_metrics
from slotmamba_slurm.cluster import SlurmCluster

SMALL = ["train.device=cpu", "train.steps=24", "train.global_batch_tokens=256", "train.micro_batch=1", "optim.warmup=2"]
SMALL += ["train.log_every=1", "train.eval_every=100", "train.eval_rows=2", "train.checkpoint.every=100"]
TWO = ["parallel.engine=fsdp2", "parallel.shard=2"]


def arguments(run_dir: Path, *more: str) -> list[str]:
    return ["mqar-tiny", f"run_dir={run_dir}", *SMALL, *more]


def output(run_dir: Path, job: str, rank: int = 0) -> str:
    return (run_dir / "slurm" / f"{job}_{rank}_log.out").read_text()


def step(run_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    steps = [record["step"] for record in read_metrics(path)] if path.exists() else []
    return max(steps, default=0)


def until(happened: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def completed(cluster: SlurmCluster, run_dir: Path, job: str) -> None:
    found = cluster.wait_for_job(job, seconds=90)
    assert found["JobState"] == "COMPLETED", output(run_dir, job)


def holds(folder: Path, text: str) -> list[Path]:
    """Files below `folder` with `text` in them."""
    return [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if text.encode() in (Path(parent) / name).read_bytes()
    ]
