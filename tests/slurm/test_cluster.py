"""A cluster on this machine comes up, runs jobs on its nodes, keeps accounts, and goes without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import ClusterError, SlurmCluster
from slotmamba_slurm.cluster.cluster import outside_jobs
from tests.slurm.conftest import MISSING

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slotmamba_slurm.cluster", *arguments], capture_output=True, text=True, timeout=100
    )


def processes(folder: Path) -> list[str]:
    """What runs with the folder in its command line or its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if any(str(folder).encode() in text for text in texts):
            found.append(texts[0].decode())
    return found


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 30
    while processes(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_tasks_run_on_their_nodes(cluster: SlurmCluster) -> None:
    assert sorted(cluster.run("srun", "--nodes=3", "hostname").stdout.split()) == ["node1", "node2", "node3"]


def test_gpus_that_are_none(cluster: SlurmCluster) -> None:
    """Jobs that ask for GPUs are given numbers of some."""
    printed = cluster.run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES").stdout
    assert printed == "0,1\n"


def test_accounts_of_a_cancelled_job(cluster: SlurmCluster) -> None:
    number = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 60").stdout.strip()
    cluster.wait_for_job(number, ("RUNNING",))
    cluster.run("scancel", number)
    assert cluster.wait_for_job(number)["JobState"] == "CANCELLED"
    deadline = time.monotonic() + 30
    while not cluster.run("sacct", "-n", "-X", "-o", "State", "-j", number).stdout.startswith("CANCELLED"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(MISSING is not None, reason=f"no Slurm: {MISSING}")
def test_up_and_down() -> None:
    up = command("up", "--nodes", "1")
    assert up.returncode == 0, up.stderr
    conf = up.stdout.splitlines()[0].removeprefix("export SLURM_CONF=")
    folder = Path(conf).parent.parent.parent
    environment = {"SLURM_CONF": conf}
    done = subprocess.run(
        ["srun", "hostname"], env=outside_jobs(os.environ) | environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "node1\n", done.stderr
    assert len(processes(folder)) >= 6  # the keeper and five daemons
    down = command("down", conf)
    assert (down.returncode, down.stderr) == (0, "")
    assert processes(folder) == [] and not folder.exists()
    again = command("down", conf)
    assert (again.returncode, again.stderr) == (1, f"error: {conf} is not of a cluster that `up` has started\n")


@pytest.mark.skipif(MISSING is not None, reason=f"no Slurm: {MISSING}")
def test_nothing_outlives_a_killed_keeper() -> None:
    conf = Path(command("up", "--nodes", "1").stdout.splitlines()[0].removeprefix("export SLURM_CONF="))
    folder = conf.parent.parent
    os.kill(int((folder / "keeper").read_text().split()[0]), signal.SIGKILL)
    assert gone(folder)
    assert command("down", str(conf)).returncode == 0  # takes the files away
    assert not folder.parent.exists()


@pytest.mark.skipif(MISSING is not None, reason=f"no Slurm: {MISSING}")
def test_a_path_too_long_for_sockets(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="too long a path for Unix sockets, of 60 characters at most"):
        SlurmCluster(tmp_path / ("long" * 20), nodes=1)


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program, path: None if program == "slurmctld" else program)
    with pytest.raises(ClusterError, match=r"^not installed: slurmctld \(Debian: apt-get install slurmctld "):
        SlurmCluster(Path("/dev/shm/sl"), nodes=1)
