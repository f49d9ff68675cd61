"""What happens to jobs of two nodes: each of these ends the start that trains, and leaves the cluster whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from slotmamba.metrics import read_metrics
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.history import Start, read_history
from tests.slurm.jobs import trainers, until


def lasting_starts(run_dir: Path) -> list[Start]:
    """Without those that ended at once because a bad node was among theirs."""
    return [start for start in read_history(run_dir) if not (start.reason or "").startswith("failed twice before on ")]


def trains(run_dir: Path, start: int, steps: int = 2) -> bool:
    """Whether it has made so many steps since its start of that number, from 0."""
    starts = lasting_starts(run_dir)
    if len(starts) <= start or not (run_dir / "metrics.jsonl").exists():
        return False
    written = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    return sum(record["time"] >= starts[start].time for record in written) >= steps


def preempt(cluster: SlurmCluster, run_dir: Path, job: str) -> None:
    """A job of the partition `preemptible` gets SIGTERM, and twenty seconds."""
    everywhere = [f"--nodes={len(cluster.nodes)}", "--exclusive", "--partition=normal"]
    urgent = cluster.run("sbatch", "--parsable", "--output=/dev/null", *everywhere, "--wrap=sleep 1").stdout.strip()
    cluster.wait_for_job(urgent, ("COMPLETED",))


def reach_the_time_limit(cluster: SlurmCluster, run_dir: Path, job: str) -> None:
    """Freezes training until Slurm's signals are there, half a minute later; one of them thaws it."""
    count = len(read_history(run_dir))
    os.kill(trainers(run_dir)[0], signal.SIGSTOP)
    cluster.run("scontrol", "update", f"job={job}", "TimeLimit=1")
    until(lambda: read_history(run_dir)[count - 1].ended)
    cluster.wait_for_job(job, ("PENDING",))
    cluster.run("scontrol", "update", f"job={job}", "TimeLimit=600")


def requeue(cluster: SlurmCluster, run_dir: Path, job: str) -> None:
    cluster.run("scontrol", "requeue", job)


def kill_a_node(cluster: SlurmCluster, run_dir: Path, job: str, number: int | None = None) -> str:
    """The first of its nodes, the second, or either in turn; returns its name."""
    starts = read_history(run_dir)
    node = starts[-1].nodes[len(starts) % 2 if number is None else number]
    cluster.kill_node(node)
    cluster.wait_for_node(node, "down")
    cluster.start_node(node)
    cluster.wait_for_node(node, "idle")
    return node
