"""Looking at runs of one process: real ones, small."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba_slurm import queue
from slotmamba_slurm.jobs import note_job
from tests.runs.commands import listed, said
from tests.slurm.jobs import arguments, cli, step, until
from tests.train.runs import committed, fails, records

pytestmark = pytest.mark.timeout(120)

FOUR = ["train.steps=4", "train.eval_every=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished, one that was stopped by its time limit, and one that failed."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", *arguments(folder / "finished", *FOUR)]) == 0
    assert main(["train", *arguments(folder / "group" / "stopped", "train.time_limit=1s", "train.steps=1000")]) == 0
    assert main(["train", *arguments(folder / "failed", *FOUR, "optim.lr=1e30", "optim.clip_norm=1e30")]) == 1
    return folder


def test_list(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, runs)
    assert list(found) == ["failed", "finished", "group/stopped"]
    finished, stopped, failed = (found[name] for name in ("finished", "group/stopped", "failed"))
    last = records(runs / "finished", "train")[-1]
    assert (finished["state"], finished["why"], finished["restarts"]) == ("finished", "", 0)
    assert (finished["step"], finished["total"], finished["loss"]) == (4, 4, last["loss"])
    assert finished["tokens_per_second"] > 0 and finished["eta"] is None and finished["job"] is None
    assert finished["nodes"] == socket.gethostname()
    assert time.time() - 3600 < finished["seen"] <= time.time()
    (saved,) = committed(runs / "group" / "stopped")
    assert (stopped["state"], stopped["why"]) == ("stopped", "train.time_limit")
    assert (stopped["step"], stopped["total"]) == (saved, 1000)
    assert failed["state"] == "failed" and re.match(r"step \d: loss ", failed["why"])


def test_list_as_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = said(capsys, "list", str(runs))
    header, _, *lines = out.splitlines()
    assert header.split() == ["run", "state", "step", "loss", "tokens/s", "ETA", "seen", "restarts", "nodes", "why"]
    assert lines[1].split()[:3] == ["finished", "finished", "4/4"]
    assert lines[2].endswith("  train.time_limit")
    assert err == ""


def test_sorted_and_filtered(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [run["step"] for run in listed(capsys, runs, "--sort", "step").values()]
    assert steps == sorted(steps)
    found = listed(capsys, runs, "--state", "failed", "--state", "stopped")
    assert list(found) == ["failed", "group/stopped"]
    assert fails(capsys, ["runs", "list", str(runs), "--sort", "steps"], code=2).endswith("did you mean step?")
    assert fails(capsys, ["runs", "list", str(runs), "--state", "done"], code=2).startswith(
        "--state done: expected one"
    )


def test_by_name(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs are below runs/ unless something else is said."""
    monkeypatch.chdir(runs)
    assert said(capsys) == ("no runs\n", "")
    (runs / "runs").symlink_to(runs / "group")
    try:
        assert said(capsys)[0].splitlines()[2].startswith("stopped  stopped")
        assert said(capsys, "show", "stopped")[0].startswith("stopped: stopped: train.time_limit\n")
        message = fails(capsys, ["runs", "show", "stoped"], code=2)
        assert message == "stoped: no such run, neither as a path nor below runs/; did you mean stopped?"
    finally:
        (runs / "runs").unlink()
    assert fails(capsys, ["runs", "show", "group"], code=2).startswith("group: nothing has trained in this folder")
    assert fails(capsys, ["runs", "list", "nowhere"], code=2) == "nowhere is not a folder"
    assert fails(capsys, ["runs", "show", ""], code=2).startswith("the name of the run is empty")


def test_without_the_word_list(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(runs.parent)
    monkeypatch.setattr("slotmamba.runs.folder.DEFAULT_FOLDER", runs)
    for options in (["--json"], ["--json", "--sort", "step"], ["--json", "--state", "failed", "--state", "stopped"]):
        assert said(capsys, *options) == said(capsys, "list", *options) == said(capsys, *options, "list")
    assert [run["name"] for run in json.loads(said(capsys, *options)[0])] == ["failed", "group/stopped"]
    message = fails(capsys, ["runs", "--json", "show", str(runs / "failed")], code=2)
    assert message == "--state, --sort and --json are options of `runs list`, not of `runs show`"


def test_show(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "finished"
    shutil.rmtree(run / "plots")
    out, err = said(capsys, "show", str(run))
    assert err == ""
    assert out.startswith(f"{run}: finished\n")
    for line in ("  step        4 of 4 (100.0%)\n", "  processes   1 (single)\n", "  checkpoints step 4\n"):
        assert line in out
    assert re.search(r"\n  validation  mqar \d\.\d{4} at step 4\n", out)
    assert re.search(
        rf"\n1      -    \d{{4}}-.*  0  {re.escape(socket.gethostname())}: 1 process  all steps done\n", out
    )
    for title in ("loss", "tokens per second", "validation loss: mqar"):
        assert re.search(rf"\n{title}\n +[\d.,]+ \|", out)
    for name in ("loss", "throughput"):
        assert f"  {run}/plots/{name}.png\n" in out
        assert (run / "plots" / f"{name}.png").stat().st_size > 1000


def test_damaged_lines_are_left_out(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "finished", run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(["{torn", *lines, "[]", '{"step": 99']))
    for command in (["list", str(tmp_path)], ["show", str(run)]):
        out, err = said(capsys, *command)
        assert err.endswith(": 2 lines of metrics.jsonl are damaged and left out\n") and err.count("\n") == 1
    assert " 4 of 4 " in out and (run / "plots" / "loss.png").exists()


def test_what_cannot_be_read_does_not_hide_the_rest(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "finished", tmp_path / "sound")
    (tmp_path / "odd" / "metrics.jsonl").mkdir(parents=True)
    out, err = said(capsys, "list", str(tmp_path), "--json")
    assert [run["name"] for run in json.loads(out)] == ["sound"]
    assert err == f"note: odd: {tmp_path}/odd/metrics.jsonl: Is a directory\n"


def test_logs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs / "finished")
    out, err = said(capsys, "logs", run)
    lines = out.splitlines()
    assert err == "" and all(line.startswith("[0] ") for line in lines)
    assert [line.removeprefix("[0] ") for line in lines] == (
        (runs / "finished" / "logs" / "rank-00000.log").read_text().splitlines()
    )
    assert said(capsys, "logs", run, "--lines", "3", "--rank", "0")[0].splitlines() == [line[4:] for line in lines[-3:]]
    assert said(capsys, "logs", run, "--lines", "0")[0] == ""
    for rank in ("-1", "1", "99999999999999999999"):
        assert fails(capsys, ["runs", "logs", run, "--rank", rank], code=2) == (
            f"--rank {rank}: {run} has 1 process, of rank 0"
        )
    assert said(capsys, "logs", run, "--follow", "--lines", "1")[0] == lines[-1] + "\n"


def pid_of_the_last_beat(run: Path) -> int:
    return int(json.loads((run / "logs" / "heartbeat-00000.json").read_bytes())["pid"])


@pytest.mark.slow
def test_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that is watched and stopped; resumed and killed; resumed again, and killed while it is to stop."""
    run = tmp_path / "run"
    command = ["train", *arguments(run, "train.steps=100000")]
    first = cli(*command)
    try:
        until(lambda: step(run) >= 3)
        running = listed(capsys, tmp_path)["run"]
        assert (running["state"], running["why"], running["total"]) == ("running", "", 100000)
        assert running["step"] >= 3 and running["eta"] > 1
        out, _ = said(capsys, "stop", str(run))
        assert out.startswith(f"{run}: stopping process {first.pid} on this machine\n")
        (saved,) = committed(run)
        assert out.splitlines()[-1] == (
            f"{run}: stopped, the newest checkpoint is of step {saved}; "
            "the same recipe, submitted or trained again, resumes"
        )
        assert first.wait(timeout=60) == 0
        assert listed(capsys, tmp_path)["run"]["state"] == "stopped"
    finally:
        first.kill()
    assert said(capsys, "stop", str(run))[0] == "nothing to stop: no process trains there and no job waits\n"
    second = cli(*command)
    try:
        until(lambda: step(run) > saved)
        running = listed(capsys, tmp_path)["run"]
        assert (running["state"], running["restarts"]) == ("running", 1)
        assert running["why"] == "restarted after: SIGTERM"
        assert said(capsys, "stop", str(run), "--now")[0] == f"{run}: cancelling process {second.pid} on this machine\n"
        assert second.wait(timeout=60) == -signal.SIGKILL
    finally:
        second.kill()
    dead = listed(capsys, tmp_path)["run"]
    assert (dead["state"], dead["why"]) == ("dead", "ended without a word (killed? out of memory?)")
    out, _ = said(capsys, "show", str(run))
    assert re.search(rf"\n1 .* 0  .*  SIGTERM\n2 .* {saved}  .*  ended without a word", out)
    third = cli(*command)
    try:
        until(lambda: pid_of_the_last_beat(run) == third.pid)
        third.send_signal(signal.SIGSTOP)  # it cannot save
        stop = cli("runs", "stop", str(run))
        assert stop.stdout is not None
        assert stop.stdout.readline() == f"{run}: stopping process {third.pid} on this machine\n"
        third.kill()
        out, err = stop.communicate(timeout=60)
        assert out.endswith(f"{run}: ended without saving, the newest checkpoint is of step {saved}\n")
        assert (stop.returncode, err) == (1, f"error: ended without saving: {run}\n")
    finally:
        third.kill()


def test_a_process_of_another_host(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lock is seen where the file system shares locks; its beats are everywhere."""
    run = tmp_path / "run"
    shutil.copytree(runs / "finished", run)
    log, beats = run / "logs" / "rank-00000.log", run / "logs" / "heartbeat-00000.json"
    log.write_text(log.read_text().partition("INFO slotmamba.progress: mqar-tiny: finished")[0])
    beat = json.loads(beats.read_text()) | {"host": "elsewhere", "pid": 7}
    beats.write_text(json.dumps(beat | {"time": time.time() - 60}))
    assert listed(capsys, tmp_path)["run"]["state"] == "running"
    beats.write_text(json.dumps(beat | {"time": time.time() - 100_000}))
    assert listed(capsys, tmp_path)["run"]["state"] == "dead"
    with (run / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert listed(capsys, tmp_path)["run"]["state"] == "running"
        message = fails(capsys, ["runs", "stop", str(run)], code=2)
        assert message == f"process 7 on elsewhere trains in {run}: run the same command there"
        beats.write_text(json.dumps(beat | {"host": socket.gethostname(), "pid": os.getppid()}))
        message = fails(capsys, ["runs", "stop", str(run)], code=1)  # which that process has not open
        assert message == f"which process trains in {run} is not known yet: try again in a moment"


def with_a_job(runs: Path, run: Path) -> Path:
    """A copy of a run, as if it had been submitted to Slurm."""
    shutil.copytree(runs / "finished", run)
    (run / "slurm" / "submission-001").mkdir(parents=True)
    shutil.copy(run / "recipe.yaml", run / "slurm" / "submission-001")
    note_job(run, "1234", "slurm", "submission-001")
    return run


def test_no_squeue(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_a_job(runs, tmp_path / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    out, err = said(capsys, "list", str(tmp_path), "--json")
    assert json.loads(out)[0]["state"] == "finished"
    assert err == "note: there is no squeue on PATH: what is said of jobs is from the run folders alone\n"
    message = fails(capsys, ["runs", "stop", str(run)], code=1)
    assert message == "there is no squeue on PATH: whether jobs run is not known"


def test_a_squeue_that_hangs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do its children, which hold its output open, keep anybody waiting, or stay."""
    with_a_job(runs, tmp_path / "run")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\nsleep 987 &\necho $! > {tmp_path}/child\nwait\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:/usr/bin:/bin")
    monkeypatch.setattr(queue, "SECONDS", 1.0)
    out, err = said(capsys, "list", str(tmp_path), "--json")
    assert json.loads(out)[0]["state"] == "finished"
    assert err.startswith("note: squeue does not answer within 1 seconds: ")
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "cmdline"
    until(lambda: not child.exists() or not child.read_bytes())


def test_a_squeue_that_fails(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_a_job(runs, tmp_path / "run")
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent))
    _, err = said(capsys, "list", str(tmp_path))
    assert err.startswith("note: squeue: slurm_load_jobs error: Unable to contact slurm controller: what is said ")
