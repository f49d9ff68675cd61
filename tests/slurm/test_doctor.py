"""`slotmamba doctor --slurm` on a real cluster, on one where something is missing, and on none."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba_slurm import trial
from slotmamba_slurm.cluster import SlurmCluster
from tests.distributed.ranks import free_port
from tests.train.runs import fails

pytestmark = [pytest.mark.timeout(120), pytest.mark.slow]


def findings(capsys: pytest.CaptureFixture[str], *settings: str, code: int) -> list[str]:
    """The lines that doctor prints, of which the last one is its verdict."""
    assert main(["doctor", "--slurm", *settings]) == code
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict == ("not usable" if code else "usable")
    return lines


def test_a_good_cluster(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = findings(capsys, "slurm.partition=preemptible", code=0)
    has = "3 of 3 nodes up, each with 4 CPUs, 4 GiB, 2 GPUs (slurm.gpus_per_node=2)"
    assert lines[1:] == [
        f"ok       partition normal (the default): {has}",
        f"ok       partition preemptible: {has}",
        "ok       time in preemptible: as long as slurm.time says, without it no limit",
        "ok       preemption in preemptible: the job is told to stop, queued again and resumes",
        "ok       KillWait: 10 s from SIGTERM to SIGKILL (preempted: 30 s); a step and a save that take longer need a "
        "smaller train.checkpoint.every",
        "ok       JobRequeue: jobs may be queued again",
        "ok       accounting answers (sacct)",
        "ok       a job runs on 2 nodes: node1, node2",
        f"ok       all nodes read and write {tmp_path}, as those of a run folder here would",
        "ok       all nodes have scontrol: a job that saved can be queued again",
        "ok       gloo: an all-reduce over 2 processes is right",
        "note     nccl was not tried: slurm.gpus_per_node=1 asks for GPUs",
    ]
    assert lines[0].startswith("ok       Slurm ") and lines[0].endswith(", cluster slotmamba answers")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_on_nodes(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """node2 has another folder at this place, no node has scontrol, and the GPUs are none."""
    (tmp_path / "here").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").symlink_to(cluster.run("which", "srun").stdout.strip())
    monkeypatch.chdir(tmp_path / "here")
    node2 = cluster.process("node2")
    mount = ["mount", "-t", "tmpfs", "none", str(tmp_path / "here")]
    subprocess.run(["nsenter", f"--target={node2}", "--mount", *mount], check=True)
    settings = ["slurm.gpus_per_node=1", f"slurm.setup=['export PATH={tmp_path}/bin']"]
    lines = findings(capsys, *settings, code=1)
    folder = tmp_path / "here"
    assert lines[-4:] == [
        f"problem  node2: no access to {folder}: put run_dir on a file system that all nodes share",
        "problem  node1, node2: there is no scontrol on PATH: a job there cannot be queued again; without it set "
        "slurm.requeue=false",
        "ok       gloo: an all-reduce over 2 processes is right",
        "problem  nccl on node1: PyTorch finds no GPU, though the job was given one: is it a build for CUDA, and of "
        "that of the driver?",
    ]


def test_busy_nodes(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A job has to wait, and could work."""
    job = cluster.run("sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 60")
    cluster.wait_for_job(job.stdout.strip(), ("RUNNING",))
    monkeypatch.setattr(trial, "QUEUE_SECONDS", 1)
    assert findings(capsys, code=0)[-1] == "note     2 nodes of normal were not free within 1 s: not tried"


def test_another_python_without_torch(cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]) -> None:
    lines = findings(capsys, "slurm.python=/nowhere/python", code=1)
    assert lines[-1].startswith("problem  a job on 2 nodes of normal does not run: ")
    assert "/nowhere/python: No such file or directory" in lines[-1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["slurm.partition=norml"], "there is no partition norml; did you mean normal?"),
        (["slurm.gpus_per_node=1", "slurm.gpu=h100"], "a job on 2 nodes of normal does not run: "),
    ],
)
def test_wrong_settings(
    settings: list[str], problem: str, cluster: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert findings(capsys, *settings, code=1)[-1].startswith(f"problem  {problem}")


def test_no_controller(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(re.sub(r"SlurmctldPort=\d+", f"SlurmctldPort={free_port()}", cluster.conf.read_text()))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    (line,) = findings(capsys, code=1)
    assert line.startswith("problem  scontrol show config: ")
    assert line.endswith(": does the controller run, is SLURM_CONF right?")


def test_no_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert findings(capsys, code=1) == [
        "problem  not on PATH: sbatch, srun, scontrol, squeue, sinfo, scancel: run this on a login node of the "
        "cluster, or install Slurm's client"
    ]


def test_keys(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, ["doctor", "--slurm", "slurm.partitn=x"], code=2)
    assert said == "override slurm.partitn=x: slurm.partitn: unknown key; did you mean slurm.partition?"
    said = fails(capsys, ["doctor", "slurm.partition=x"], code=2)
    assert said == "unknown arguments: slurm.partition=x"
