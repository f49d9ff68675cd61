"""One cluster of three nodes for all tests that ask for one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import SlurmCluster, missing_for_a_cluster

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
