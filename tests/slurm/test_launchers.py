"""How the processes of a job are started: by Slurm, by torchrun, with another Python, in containers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba.config import Recipe, load_recipe
from slotmamba.errors import InputError
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.resources import slurm_parameters
from slotmamba_slurm.torchrun import _catches
from tests.distributed.ranks import free_port
from tests.slurm.jobs import SECRETS, SMALL, cli, completed, holds, output, step, succeeds, until
from tests.train.runs import committed, records

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

# Takes the signal late, as a process does that imports torch first, and says how often it came.
WORKER = """\
import os, signal, sys, time
from pathlib import Path
time.sleep(1)
came = []
signal.signal(signal.SIGUSR2, lambda *_: came.append(1))
while not came:
    time.sleep(0.01)
time.sleep(1)
Path(sys.argv[1], os.environ["RANK"]).write_text(str(len(came)))
"""


def test_torchrun_on_two_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Two processes on each. Slurm sends all of them and torchrun SIGTERM: a checkpoint is taken between two steps, and
    the losses are those of one process, to float32 sums in another order."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    small = [*SMALL, "train.global_batch_tokens=512", "optim.lr=1.0e-3", "optim.eps=1.0e-6"]
    job = ["slurm.nodes=2", "slurm.launcher=torchrun", "parallel.engine=fsdp2", "parallel.shard=4"]
    number = succeeds(cli("submit", "mqar-tiny", f"run_dir={both}", *small, *job, **SECRETS)).split()[2]
    until(lambda: step(both) >= 2)
    cluster.run("scontrol", "requeue", number)
    until(lambda: committed(both))
    (first,) = committed(both)
    assert main(["train", "mqar-tiny", f"run_dir={alone}", *small, "train.micro_batch=4"]) == 0
    completed(cluster, both, number)
    said = output(both, number)
    assert 2 <= first < 24
    assert f"SIGTERM: saved at step {first} of 24" in said and f"mqar-tiny: resumes after step {first} " in said
    assert [record["step"] for record in records(both, "train")] == list(range(1, 25))
    one, four = ([record["loss"] for record in records(folder, "train")] for folder in (alone, both))
    assert four == pytest.approx(one, rel=1e-4)
    script = (both / "slurm" / f"{number}_submission.sh").read_text()
    assert holds(both, "hunter2") == []
    assert "#SBATCH --ntasks-per-node=1\n" in script and "#SBATCH --cpus-per-task=2\n" in script


def test_who_starts_after_the_signal_is_told_once(tmp_path: Path) -> None:
    """torchrun gets all signals before it has started a process, and lives."""
    (tmp_path / "worker.py").write_text(WORKER)
    where = ["--nnodes=1", "--node-rank=0", "--nproc-per-node=2", "--rdzv-backend=static", "--master-addr=127.0.0.1"]
    where.append(f"--master-port={free_port()}")
    process = subprocess.Popen(
        [sys.executable, "-m", "slotmamba_slurm.torchrun", *where, str(tmp_path / "worker.py"), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        until(lambda: _catches(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


def test_options_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = in_container(tmp_path / "run", "slurm.container_mounts=['/data:/data:ro']")
    assert slurm_parameters(recipe, tmp_path / "code")["srun_args"][-3:] == [
        "--container-image=nvcr.io#nvidia/pytorch:25.09-py3",
        f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data:/data:ro",
        f"--container-workdir={tmp_path}",
    ]


def in_container(run_dir: Path, *more: str) -> Recipe:
    return load_recipe("mqar-tiny", [f"run_dir={run_dir}", "slurm.container='nvcr.io#nvidia/pytorch:25.09-py3'", *more])


def test_a_container_that_is_stopped(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Without containers here: an srun that leaves pyxis' options out, and tasks that, as in an image, have none of
    Slurm's commands: what runs outside queues the job again."""
    tools, run_dir = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    srun = tools / "srun"
    srun.write_text(
        "#!/bin/bash\n"
        f'printf "%s\\n" "$@" > {tmp_path}/arguments\n'
        'options=(); for each in "$@"; do case "$each" in --container-*) ;; *) options+=("$each");; esac; done\n'
        f'PATH={tools / "image"} exec {cluster.run("which", "srun").stdout.strip()} "${{options[@]}}"\n'
    )
    srun.chmod(0o755)
    (tools / "image").mkdir()
    (tools / "image" / "env").symlink_to("/usr/bin/env")
    python = tools / "python of the image"
    python.write_text(f'#!/bin/sh\necho "another python"\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    settings = [f"run_dir={run_dir}", *SMALL, "slurm.container=image", f"slurm.python={python}"]
    settings += [f"slurm.setup=['export PATH={tools}:$PATH']"]
    number = succeeds(cli("submit", "mqar-tiny", *settings)).split()[2]
    until(lambda: step(run_dir) >= 2)
    cluster.run("scancel", "--signal=USR2", number)
    completed(cluster, run_dir, number)
    said = output(run_dir, number)
    assert "mqar-tiny: resumes after step " in said and said.count("another python\n") == 2
    assert cluster.job(number)["Restarts"] == "1"
    assert "--container-image=image\n" in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["slurm.gpu=h100"], "slurm: gpu=h100 needs gpus_per_node, which is 0"),
        (["slurm.container_mounts=[/data:/data]"], "slurm: container_mounts needs container, the image"),
        (["slurm.launcher=torchrn"], "expected tasks or torchrun, got 'torchrn'; did you mean torchrun?"),
    ],
)
def test_refused(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_recipe("mqar-tiny", settings)


def test_a_type_of_gpu(tmp_path: Path) -> None:
    recipe = load_recipe("mqar-tiny", ["slurm.gpus_per_node=1", "slurm.gpu=h100"])
    assert slurm_parameters(recipe, tmp_path / "code")["gpus_per_node"] == "h100:1"
