"""Sweeps: a job array on a real Slurm, the same on this machine, what is refused, and the table at the end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba.config.sweep_file import read_sweep
from slotmamba_slurm.cluster import SlurmCluster
from tests.slurm.jobs import arguments, holds, output, step, until
from tests.train.runs import assert_same_tensors, committed, fails, records, tensors

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

STEPS = 16
SWEEP = ["sweep.optim.lr=[1e-3,1e30]", "sweep.model.slots.top_k=[4,8]", f"train.steps={STEPS}", "train.eval_every=8"]
TWO_AT_A_TIME = "slurm.array_parallelism=2"
GOOD = ["optim.lr=0.001,model.slots.top_k=4", "optim.lr=0.001,model.slots.top_k=8"]
DIVERGES = ["optim.lr=1e+30,model.slots.top_k=4", "optim.lr=1e+30,model.slots.top_k=8"]


def running(cluster: SlurmCluster) -> int:
    return len(cluster.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i").stdout.split())
