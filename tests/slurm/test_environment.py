"""What the shell that submits was set up for does not change the job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.executors import _without_options
from tests.slurm.jobs import arguments, cli, completed, reasons, succeeds

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]

# Of a process of torchrun that nobody else will meet.
WORLD = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
WORLD |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "x"}
OPTIONS = {"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE", "SBATCH_ARRAY_INX": "0-3", "SBATCH_JOB_NAME": "other"}


def test_on_slurm(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Also sbatch's own options."""
    out = succeeds(cli("submit", *arguments(tmp_path, "train.steps=2"), **WORLD, **OPTIONS))
    found = re.search(r"^mqar-tiny: job (\d+) on 1 node: 1 process$", out, re.MULTILINE)
    assert found, out
    completed(cluster, tmp_path, found[1], seconds=60)
    assert cluster.job(found[1])["JobName"] == "mqar-tiny"
    assert reasons(tmp_path) == ["finished"]


def test_on_this_machine(tmp_path: Path) -> None:
    succeeds(cli("submit", *arguments(tmp_path, "train.steps=2", "cluster=local"), **WORLD), seconds=60)
    assert reasons(tmp_path) == ["finished"]


def test_what_recipes_do_not_say_comes_from_the_site() -> None:
    shell = {"SBATCH_ACCOUNT": "site", "SBATCH_PARTITION": "site", "SBATCH_TIMELIMIT": "1", "SLURM_CONF": "x"}
    assert _without_options(shell, {"account": None, "partition": "mine"}) == {
        "SBATCH_ACCOUNT": "site",
        "SLURM_CONF": "x",
    }
