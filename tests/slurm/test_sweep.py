"""Sweeps: a job array on a real Slurm, the same on this machine, what is refused, and the results at the end."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba_slurm.cluster import SlurmCluster
from tests.slurm.jobs import SMALL, cli, step, succeeds, until
from tests.train.runs import assert_same_tensors, committed, fails, records, tensors

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

STEPS = 16
SWEEP = [*SMALL, f"train.steps={STEPS}", "train.eval_every=8", "slurm.max_retries=0", "slurm.array_parallelism=2"]
RATES = ["sweep.optim.lr=[1e-3,2e-3,1e30,3e-3]"]  # with the third it diverges
NAMES = [f"optim.lr={rate}" for rate in ("0.001", "0.002", "1e+30", "0.003")]
GOOD, FAILING = [NAMES[0], NAMES[1], NAMES[3]], NAMES[2]
ERROR = "error: step 2: loss "


def arguments(run_dir: Path, *more: str) -> list[str]:
    return ["mqar-tiny", f"run_dir={run_dir}", *SWEEP, *RATES, *more]


def results(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep on this machine; its output is in the file `printed`."""
    run_dir = tmp_path_factory.mktemp("local")
    process = cli("submit", *arguments(run_dir, "cluster=local"))
    try:
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 1, out + err  # a cell has failed
    assert err.startswith(ERROR)
    (run_dir / "printed").write_text(out)
    return run_dir


def assert_three_results_and_a_failure(run_dir: Path, table: str) -> None:
    assert table.startswith("mqar-tiny: 3 finished, 1 failed\nbest first by recall, the mean over all settings ")
    rows = results(run_dir)
    assert [row["state"] for row in rows] == ["finished", "finished", "finished", "failed"]
    assert {row["cell"] for row in rows[:3]} == set(GOOD) and rows[3]["cell"] == FAILING
    best = [(-float(row["recall"]), float(row["validation loss"])) for row in rows[:3]]
    assert best == sorted(best)
    assert [(row["step"], row["steps"]) for row in rows] == [("16", "16")] * 3 + [("1", "16")]
    failure = table[table.index(f"{FAILING}: failed after step 1") :]
    assert re.search(rf"^    {ERROR}.* gradient norm nan; the weights were not changed", failure, re.MULTILINE)
    for plot in ("sweep.png", "steps.png"):
        assert (run_dir / "plots" / plot).read_bytes().startswith(b"\x89PNG")


def test_on_this_machine(local: Path) -> None:
    out = (local / "printed").read_text()
    lines = out.splitlines()
    assert lines[0] == "mqar-tiny: a sweep of 4 cells"
    ended = [line.strip() for line in lines if re.search(r"\(\d of 4\)$", line)]
    assert [line.rpartition("(")[2] for line in ended] == [f"{number} of 4)" for number in (1, 2, 3, 4)]
    assert sorted(line.rpartition(" (")[0] for line in ended) == sorted(
        [*(f"{name}: ended" for name in GOOD), f"{FAILING}: failed"]
    )
    assert_three_results_and_a_failure(local, out[out.index("mqar-tiny: 3 finished") :])
    assert (local / "results.txt").read_text() in out


def test_an_array(cluster: SlurmCluster, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two at a time, one of which is requeued and resumes, to the results that cells have on this machine."""
    out = succeeds(cli("submit", *arguments(tmp_path)))
    found = re.search(r"^  job (\d+): 4 cells, 2 at a time$", out, re.MULTILINE)
    assert found and out.startswith("mqar-tiny: a sweep of 4 cells\n")
    job, first = found[1], tmp_path / NAMES[0]
    assert "#SBATCH --array=0-3%2\n" in (tmp_path / "slurm" / f"{job}_submission.sh").read_text()
    until(lambda: step(first) >= 2)
    assert main(["submit", *arguments(tmp_path)]) == 0  # nothing is submitted twice
    assert "a sweep of 4 cells, 4 queued or running already\n" in capsys.readouterr().out
    cluster.run("scontrol", "requeue", f"{job}_0")
    most = 0

    def over() -> bool:
        nonlocal most
        states = cluster.run("squeue", "--noheader", "--array", "--format=%T").stdout.split()
        most = max(most, states.count("RUNNING"))
        return not states

    until(over, seconds=200)
    assert most == 2
    assert_three_results_and_a_failure(tmp_path, (tmp_path / "results.txt").read_text())
    said = (first / "slurm" / f"{job}_0_0_log.out").read_text()
    assert "stopped by SIGTERM, " in said and f"mqar-tiny:{NAMES[0]}: resumes after step " in said
    for name in GOOD:
        assert records(tmp_path / name) == records(local / name)
        assert_same_tensors(tensors(tmp_path / name, STEPS), tensors(local / name, STEPS))
    assert main(["runs", "list", str(tmp_path)]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(words[0], words[1]) for words in listed] == [
        (name, "failed" if name == FAILING else "finished") for name in sorted(NAMES)
    ]


def test_again(local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a sweep that was submitted before only what is not finished is: here nothing, and then a new value."""
    finished = ["mqar-tiny", f"run_dir={local}", *SWEEP, "cluster=local"]
    assert main(["submit", *finished, "sweep.optim.lr=[1e-3,2e-3]"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mqar-tiny: a sweep of 2 cells, 2 already finished\nmqar-tiny: 3 finished, 1 failed\n")
    assert main(["submit", *finished, "sweep.optim.lr=[1e-3,2e-3,4e-3]", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(
        "mqar-tiny: a sweep of 3 cells, 2 already finished\n  optim.lr=0.004\n\n"
        "cluster=local: 2 at a time on this machine, 1 process each\n"
    )


def test_dry_run(cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *arguments(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "\n#SBATCH --array=0-3%2\n" in out and "\n  optim.lr:\n" in out
    assert f"mqar-tiny: a sweep of 4 cells\n{''.join(f'  {name}{chr(10)}' for name in NAMES)}" in out
    assert "using 1 processors on nodes node1 in partition normal" in out.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "-h").stdout == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sweep.optim.lrr=[1]"], "cell optim.lr=0.001,optim.lrr=1: optim.lrr: unknown key; did you mean optim.lr?"),
        (["sweep.model.d_model=[64,65]"], "cell optim.lr=0.001,model.d_model=65: "),
        (["slurm.partition=big"], "the cluster refuses the job: invalid partition specified: big"),
        (["sweep.seed=" + str(list(range(251)))], "sweep: 1,004 cells, expected 1,000 at most"),
    ],
)
def test_refused(
    settings: list[str], message: str, cluster: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, ["submit", *arguments(tmp_path / "run", *settings)], code=2)
    assert message in said
    assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "-h").stdout == ""


@pytest.mark.soak
def test_a_chain(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Where jobs are not queued again, a second array goes on with the cells that the first one has left."""
    more = ["slurm.requeue=false", "slurm.chain=2", "sweep.optim.lr=[1e-3,2e-3]"]
    out = succeeds(cli("submit", *arguments(tmp_path, *more)))
    found = re.search(r"^  job (\d+): 2 cells\n  goes on as  (\d+), ", out, re.MULTILINE)
    assert found
    first, second = found.groups()
    until(lambda: step(tmp_path / NAMES[0]) >= 2)
    cluster.run("scancel", "--signal=USR2", f"{first}_0")
    until(lambda: not cluster.run("squeue", "--noheader").stdout.split(), seconds=120)
    assert {row["state"] for row in results(tmp_path)} == {"finished"}
    stopped, finished = (tmp_path / name / "slurm" for name in NAMES[:2])
    assert f"job {second}_0 of the chain goes on\n" in (stopped / f"{first}_0_0_log.out").read_text()
    assert "resumes after step " in (stopped / f"{second}_0_0_log.out").read_text()
    assert f"the rest of the chain is cancelled: {second}_1\n" in (finished / f"{first}_1_0_log.out").read_text()
    assert (finished / f"{second}_1_0_log.out").read_text() == ""


def test_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`runs stop` of a sweep saves the cell that runs and keeps the others from starting."""
    more = ["slurm.array_parallelism=1", "cluster=local", "train.steps=2000"]
    process = cli("submit", *arguments(tmp_path, *more))
    try:
        until(lambda: step(tmp_path / NAMES[0]) >= 2)
        assert main(["runs", "stop", str(tmp_path)]) == 0
        out = succeeds(process)
    finally:
        process.kill()
    assert f"  {NAMES[0]}: stopped (1 of 4)\nstopped: 3 cells are not started\n" in out
    assert "mqar-tiny: 1 stopped, 3 submitted\n" in out
    assert len(committed(tmp_path / NAMES[0])) == 1


def test_folders_of_others(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run and a sweep in one folder would hide each other."""
    run = ["submit", "mqar-tiny", *SMALL, "train.steps=2"]
    assert main([*run, f"run_dir={tmp_path}", "cluster=debug"]) == 0
    capsys.readouterr()
    sweep = f"{local} is the folder of a sweep, whose runs are below it: set another run_dir for this run"
    for cluster in ("local", "debug"):
        for dry_run in ([], ["--dry-run"]):
            assert fails(capsys, [*run, f"run_dir={local}", f"cluster={cluster}", *dry_run], code=2) == sweep
    said = fails(capsys, ["submit", *arguments(tmp_path, "cluster=local")], code=2)
    assert said == f"{tmp_path} is the folder of a run: set another run_dir for this sweep"
