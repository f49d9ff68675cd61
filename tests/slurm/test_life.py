"""What happens to a job on a real Slurm: the run goes on, to the weights of an undisturbed one, and it is known why."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.history import Start, read_history
from tests.slurm.events import kill_a_node, preempt, reach_the_time_limit, trains
from tests.slurm.jobs import completed, output, submitted, tasks, trainers, until
from tests.train.runs import assert_same_tensors, records, tensors

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def assert_undisturbed(cluster: SlurmCluster, run_dir: Path, job: str, undisturbed: Path) -> list[Start]:
    """All starts, each of which resumed from what the one before had saved."""
    completed(cluster, run_dir, job)
    assert records(run_dir, "train") == records(undisturbed, "train")
    assert_same_tensors(tensors(run_dir, 24), tensors(undisturbed, 24))
    starts = read_history(run_dir)
    assert [(start.job, start.restart) for start in starts] == [(job, number) for number in range(len(starts))]
    for before, start in pairwise(starts):
        assert start.resumed_from == (before.resumed_from if before.ended is None else before.checkpoint)
    last = starts[-1]
    assert (last.ended, last.reason, last.exit_code, last.step, last.checkpoint) == ("finished", "finished", 0, 24, 24)
    return starts


def test_preempted_by_a_higher_partition(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    job = submitted(cluster, tmp_path, "slurm.partition=preemptible")
    until(lambda: trains(tmp_path, 0))
    preempt(cluster, tmp_path, job)
    first, _ = assert_undisturbed(cluster, tmp_path, job, undisturbed)
    assert (first.ended, first.reason, first.signal) == ("stopped", "preempted", "SIGTERM")


def test_time_limit(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    job = submitted(cluster, tmp_path, "slurm.time=1h", "slurm.signal_lead=30s")
    until(lambda: trains(tmp_path, 0))
    reach_the_time_limit(cluster, tmp_path, job)
    first, _ = assert_undisturbed(cluster, tmp_path, job, undisturbed)
    assert (first.ended, first.reason, first.signal) == ("stopped", "time limit", "SIGUSR2")


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_node_is_killed(number: int, cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    """With rank 0, which leaves no word, and without, in which case training fails before Slurm notices the node."""
    job = submitted(cluster, tmp_path, "train.checkpoint.every=4")
    until(lambda: trains(tmp_path, 0))
    node = kill_a_node(cluster, tmp_path, job, number)
    first, _ = assert_undisturbed(cluster, tmp_path, job, undisturbed)
    assert (first.ended, first.reason) == (None if number == 0 else "failed", "node failure")
    assert first.bad_nodes == (node,) == (first.nodes[number],)


def test_a_node_that_fails_twice(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    """A rank killed there, then the node lost: the job keeps away from it. Until then there is no other."""
    cluster.run("scontrol", "update", "nodename=node3", "state=drain", "reason=test")
    job = submitted(cluster, tmp_path)
    until(lambda: trains(tmp_path, 0))
    os.kill(trainers(tmp_path)[1], signal.SIGKILL)
    until(lambda: trains(tmp_path, 1))
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    until(lambda: read_history(tmp_path)[1].excluded)
    cluster.run("scontrol", "update", "nodename=node3", "state=resume")
    first, second, third = assert_undisturbed(cluster, tmp_path, job, undisturbed)
    assert (first.ended, first.reason, first.exit_code) == ("failed", "training failed (exit code 1)", 1)
    assert (second.ended, second.reason, second.signal) == ("stopped", "node failure", "SIGTERM")
    assert first.bad_nodes == second.bad_nodes == second.excluded == ("node2",)
    assert (first.nodes, second.nodes, third.nodes) == (("node1", "node2"), ("node1", "node2"), ("node1", "node3"))
    said = output(tmp_path, job)
    assert "training failed (exit code 1): retry 1 of 2\n" in said
    assert "the job has failed twice on node2: excluded from now on\n" in said


@pytest.mark.parametrize("sent", [signal.SIGUSR2, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_a_controller_that_does_not_answer(
    sent: signal.Signals, cluster: SlurmCluster, tmp_path: Path, undisturbed: Path
) -> None:
    """When the job is told to stop, and when training fails: the history knows it, and the job asks until it is there
    again."""
    job = submitted(cluster, tmp_path)
    until(lambda: trains(tmp_path, 0))
    controller = int((cluster.folder / "run" / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGSTOP)
    try:
        if sent == signal.SIGKILL:
            os.kill(trainers(tmp_path)[0], sent)
        else:
            for task in tasks(tmp_path).values():
                os.kill(task, sent)
        until(lambda: "asking again for up to 600 s\n" in output(tmp_path, job))
        (start,) = read_history(tmp_path)
        assert start.ended == ("failed" if sent == signal.SIGKILL else "stopped")
    finally:
        os.kill(controller, signal.SIGCONT)
    first, _ = assert_undisturbed(cluster, tmp_path, job, undisturbed)
    assert first.reason == ("training failed (SIGKILL)" if sent == signal.SIGKILL else "told to stop by SIGUSR2")
