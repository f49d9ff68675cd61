"""Twenty random events in one run, on a real Slurm of five nodes: no trace of them but in its history."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import SlurmCluster
from tests.slurm.conftest import MISSING
from tests.slurm.events import kill_a_node, lasting_starts, preempt, reach_the_time_limit, requeue, trains
from tests.slurm.jobs import TWO, arguments, cli, completed, submitted, succeeds, until
from tests.train.runs import assert_same_run

pytestmark = [pytest.mark.timeout(3600), pytest.mark.soak]

LONG = ["train.steps=300", "train.checkpoint.every=10"]
EVENTS = {
    "preempted": preempt,
    "time limit": reach_the_time_limit,
    "requeued by an operator": requeue,
    "node failure": kill_a_node,
}
SEED = 6


@pytest.fixture
def five_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """Two may be excluded, and one down, before a job of two nodes has to wait."""
    if MISSING:
        pytest.skip(f"no Slurm: {MISSING}")
    with tempfile.TemporaryDirectory(prefix="sl", dir="/dev/shm") as folder:
        Path(folder).chmod(0o711)
        with SlurmCluster(Path(folder) / "c", nodes=5) as cluster:
            monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
            yield cluster


def test_twenty_random_events(five_nodes: SlurmCluster, tmp_path: Path) -> None:
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    succeeds(cli("submit", *arguments(undisturbed, *TWO, *LONG, "cluster=local")), seconds=600)
    chance = random.Random(SEED)
    events = [*EVENTS] * 5
    chance.shuffle(events)
    settings = ["slurm.partition=preemptible", "slurm.time=10h", "slurm.signal_lead=30s"]
    job = submitted(five_nodes, run_dir, *LONG, *settings)
    for number, reason in enumerate(events):
        until(partial(trains, run_dir, number, steps=chance.randint(1, 12)), seconds=180)
        EVENTS[reason](five_nodes, run_dir, job)
    completed(five_nodes, run_dir, job, seconds=300)
    assert_same_run(run_dir, undisturbed)
    assert [start.reason for start in lasting_starts(run_dir)] == [*events, "finished"]
