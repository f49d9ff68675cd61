"""One cluster of three nodes for all tests that ask for one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import SlurmCluster, missing_for_a_cluster
from tests.slurm.jobs import TWO, arguments, cli, succeeds

MISSING = missing_for_a_cluster()


@pytest.fixture(scope="session")
def one_cluster() -> Iterator[SlurmCluster]:
    if MISSING:
        pytest.skip(f"no Slurm: {MISSING}")
    # Not tmp_path, which is long, on a slow disk perhaps, and closed to others: munged refuses that.
    with tempfile.TemporaryDirectory(prefix="sl", dir="/dev/shm") as folder:
        Path(folder).chmod(0o711)
        with SlurmCluster(Path(folder) / "c", nodes=3) as cluster:
            yield cluster


@pytest.fixture
def cluster(one_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """Its commands find it; its jobs end with the test."""
    monkeypatch.setenv("SLURM_CONF", str(one_cluster.conf))
    yield one_cluster
    one_cluster.reset()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes on this machine that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    out = succeeds(cli("submit", *arguments(run_dir, *TWO, "cluster=local")))
    assert out.startswith("mqar-tiny: job ") and " on this machine: 2 processes\n" in out
    return run_dir
