"""What Slurm itself does to a job, beside `test_submit`: the run goes on, to the weights of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba_slurm.cluster import SlurmCluster
from tests.slurm.jobs import completed, output, step, submitted, until
from tests.train.runs import assert_same_tensors, records, tensors

pytestmark = [pytest.mark.timeout(240), pytest.mark.soak]


def assert_undisturbed(cluster: SlurmCluster, run_dir: Path, job: str, undisturbed: Path) -> None:
    completed(cluster, run_dir, job)
    assert cluster.job(job)["Restarts"] == "1"
    assert "mqar-tiny: resumes after step " in output(run_dir, job)
    assert records(run_dir, "train") == records(undisturbed, "train")
    assert_same_tensors(tensors(run_dir, 24), tensors(undisturbed, 24))


def test_preempted_by_a_higher_partition(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    """SIGTERM alone, and twenty seconds."""
    job = submitted(cluster, tmp_path, "slurm.partition=preemptible")
    until(lambda: step(tmp_path) >= 2)
    urgent = ["--parsable", "--output=/dev/null", "--partition=normal", "--nodes=3", "--exclusive", "--wrap=sleep 1"]
    cluster.wait_for_job(cluster.run("sbatch", *urgent).stdout.strip(), ("COMPLETED",))
    assert_undisturbed(cluster, tmp_path, job, undisturbed)
    assert "stopped by SIGTERM, " in output(tmp_path, job)


def test_a_node_goes_down(cluster: SlurmCluster, tmp_path: Path, undisturbed: Path) -> None:
    job = submitted(cluster, tmp_path)
    until(lambda: step(tmp_path) >= 2)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    assert_undisturbed(cluster, tmp_path, job, undisturbed)
