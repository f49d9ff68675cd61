"""Submissions that cannot be: one line, and nothing of them is left, neither in the queue nor in the run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba.config import load_recipe
from slotmamba.errors import InputError
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.submission import all_or_nothing, write_recipe, write_submission
from tests.slurm.jobs import SMALL, arguments, cli, ended_with_the_test, until
from tests.train.runs import fails

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]


def assert_no_jobs(cluster: SlurmCluster) -> None:
    """But for those that are being cancelled."""
    assert cluster.run("squeue", "-h", "-t", "RUNNING,PENDING,CONFIGURING").stdout == ""


def assert_nothing_left(cluster: SlurmCluster, run_dir: Path) -> None:
    assert not run_dir.exists()
    assert_no_jobs(cluster)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs at a folder, for as long as the block lasts."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_too_many_nodes(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, ["submit", "mqar-tiny", f"run_dir={tmp_path / 'run'}", "slurm.nodes=4"], code=2)
    assert said == "the cluster refuses the job: Requested node configuration is not available"
    assert_nothing_left(cluster, tmp_path / "run")


@pytest.mark.parametrize("missing", ["srun", "sbatch"])
def test_no_client(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for program in {"srun", "sbatch"} - {missing}:
        (tmp_path / program).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = fails(capsys, ["submit", *arguments(tmp_path / "run")], code=2)
    assert said == f"there is no {missing} on PATH: submit from a node of the cluster, or set cluster=local"
    assert not (tmp_path / "run").exists()


def test_no_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    said = fails(capsys, ["submit", *arguments(tmp_path / "run")], code=2)
    assert said == "the cluster refuses the job: Unable to contact slurm controller (connect failure)"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("locked", ["recipe", "run folder"])
def test_no_permission(locked: str, cluster: SlurmCluster, tmp_path: Path) -> None:
    """As a user whom file permissions bind, which they do not root, as whom clusters on one machine run."""
    recipe, folder = tmp_path / "mine.yaml", tmp_path / "folder"
    folder.mkdir()
    recipe.write_text("extends: mqar-tiny\nname: mine\n")
    path = recipe if locked == "recipe" else folder
    path.chmod(0o000)
    command = [sys.executable, "-m", "slotmamba.cli", "submit", str(recipe), f"run_dir={folder / 'run'}", *SMALL]
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    done = subprocess.run([*bound, *command], capture_output=True, text=True, timeout=60)
    path.chmod(0o700)
    refused = f"{recipe}: Permission denied"
    if locked != "recipe":
        refused = f"{folder / 'run' / 'slurm'}: Permission denied: nothing is submitted"
    assert (done.stderr, done.returncode) == (f"error: {refused}\n", 2)
    assert_nothing_left(cluster, folder / "run")


def test_a_full_disk(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is place for one file more each time, from the last files of the code's copy on, until the job is
    submitted: whatever cannot be written, before sbatch or after it."""
    disk, trial = tmp_path / "disk", tmp_path / "trial"
    disk.mkdir()
    write_submission(load_recipe("mqar-tiny", [f"run_dir={trial}"]), git={}, written=[])
    files = sum(1 for _ in trial.rglob("*"))
    refusals = 0
    for inodes in range(files - 2, files + 20):
        with mounted(disk, f"nr_inodes={inodes}"):
            code = main(["submit", *arguments(disk / "run", "train.steps=1000")])
            err = capsys.readouterr().err
            if code == 0:
                cluster.reset()
                break
            refusals += 1
            assert code == 1
            assert err == f"error: {disk / 'run' / 'slurm'}: No space left on device: nothing is submitted\n"
            assert_no_jobs(cluster)
    else:
        raise AssertionError("never enough")
    assert refusals >= 4


def test_a_full_spool(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The controller has no place for the job's script, which `sbatch --test-only` does not find out."""
    with mounted(cluster.folder / "state", "nr_inodes=1"):
        said = fails(capsys, ["submit", *arguments(tmp_path / "run")], code=2)
    assert said == ("sbatch has failed: Batch job submission failed: I/O error writing script/environment to file")
    assert_nothing_left(cluster, tmp_path / "run")


@pytest.mark.parametrize("sweep", [[], ["sweep.seed=[1,2,3]"]])
@pytest.mark.parametrize("after", [0, 4])
def test_interrupted(after: int, sweep: list[str], cluster: SlurmCluster, tmp_path: Path) -> None:
    """Ctrl-C when some jobs of a chain are in the queue: none of them stays there, nor any file."""
    run_dir = tmp_path / "run"
    process = cli("submit", *arguments(run_dir, "slurm.requeue=false", "slurm.chain=60", *sweep))
    with ended_with_the_test(process):
        until(lambda: len(list(run_dir.glob("slurm/*_submitted.pkl" if after else "slurm/submission-*"))) >= after + 1)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert_nothing_left(cluster, run_dir)


def test_a_failure_leaves_the_files_of_others(tmp_path: Path) -> None:
    recipe = load_recipe("mqar-tiny", [f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(InputError), all_or_nothing(recipe) as written:
        write_recipe(recipe, written)
        other = write_recipe(recipe, [])
        (other.folder.parent / "12_submitted.pkl").touch()
        raise InputError("sbatch has failed")
    assert sorted(path.name for path in other.folder.parent.iterdir()) == ["12_submitted.pkl", "submission-002"]


@pytest.mark.parametrize("name", ["x%u", "x%j", "x\\y"])
def test_paths_that_slurm_reads_otherwise(
    name: str,
    cluster: SlurmCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, setting in (("name", f"name={name}"), ("run_dir", f"run_dir={tmp_path / name}")):
        for where in ("slurm", "local"):
            said = fails(capsys, ["submit", "mqar-tiny", *SMALL, setting, f"cluster={where}"], code=2)
            assert said.startswith(f"{key}=") and said.endswith(" has a meaning for Slurm: set a run_dir without")
    assert list(tmp_path.iterdir()) == []
    assert_no_jobs(cluster)
