"""RUN_DIR/slurm/history.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba_slurm.history import WITHOUT_A_WORD, History, history_file, last_step, newest_checkpoint, read_history


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "slurm").mkdir()
    return tmp_path


def checkpoint(run_dir: Path, step: int, committed: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    if committed:
        (folder / "manifest.json").touch()


def test_starts_and_ends(run_dir: Path) -> None:
    checkpoint(run_dir, 20)
    first = History(run_dir, "7", 0)
    first.started("submission-001", ["node1", "node2"], processes=4)
    (run_dir / "metrics.jsonl").write_text('{"step": 29}\n{"step": 30}\n{"st')
    checkpoint(run_dir, 30)
    first.ended("stopped", 0, None, signal="SIGTERM")
    (start,) = read_history(run_dir)
    assert (start.job, start.restart, start.submission, start.processes) == ("7", 0, "submission-001", 4)
    assert start.nodes == ("node1", "node2")
    assert (start.resumed_from, start.step, start.checkpoint) == (20, 30, 30)
    assert (start.ended, start.signal, start.exit_code, start.reason) == ("stopped", "SIGTERM", 0, None)
    assert start.ended_at is not None and start.time <= start.ended_at
    second = History(run_dir, "7", 1)
    second.explained(start, "node failure", ["node2"])
    second.started("submission-001", ["node1", "node3"], processes=4)
    second.ended("finished", 0, "finished")
    one, two = read_history(run_dir)
    assert (one.reason, one.bad_nodes, one.signal) == ("node failure", ("node2",), "SIGTERM")
    assert (two.restart, two.ended, two.reason, two.resumed_from) == (1, "finished", "finished", 30)


def test_a_start_that_says_nothing_more(run_dir: Path) -> None:
    History(run_dir, "7", 0).started("submission-001", ["node1"], processes=1)
    (running,) = read_history(run_dir)
    assert (running.ended, running.reason, running.resumed_from) == (None, None, None)
    History(run_dir, "7", 1).started("submission-001", ["node1"], processes=1)
    assert [start.reason for start in read_history(run_dir)] == [WITHOUT_A_WORD, None]


@pytest.mark.parametrize("kept", [1, 30, -1])
def test_a_torn_line(kept: int, run_dir: Path) -> None:
    history = History(run_dir, "7", 0)
    history.started("submission-001", ["node1"], processes=1)
    whole = history_file(run_dir).read_bytes()
    history.ended("finished", 0, "finished")
    end = history_file(run_dir).read_bytes()[len(whole) :]
    history_file(run_dir).write_bytes(whole + end[:kept])
    # A line that lacks nothing but its end is whole.
    assert [start.ended for start in read_history(run_dir)] == ["finished" if kept == -1 else None]
    History(run_dir, "7", 1).started("submission-001", ["node1"], processes=1)
    assert [start.restart for start in read_history(run_dir)] == [0, 1]


def test_a_disk_that_takes_no_more(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An end goes to the output; the next start is none."""
    history_file(run_dir).mkdir()
    history = History(run_dir, "7", 0)
    history.ended("stopped", 1, "preempted", signal="SIGTERM")
    said = capsys.readouterr().out
    assert said.startswith("the history of the run cannot be written: ") and "'reason': 'preempted'" in said
    with pytest.raises(OSError):
        history.started("submission-001", ["node1"], processes=1)


def test_nothing_there(tmp_path: Path) -> None:
    assert read_history(tmp_path) == []
    assert newest_checkpoint(tmp_path) is None and last_step(tmp_path) is None


def test_only_committed_checkpoints_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, committed=False)
    (tmp_path / "checkpoints" / "step-00000030.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000030.tmp" / "manifest.json").touch()
    assert newest_checkpoint(tmp_path) == 10


def test_another_job_has_started_since(run_dir: Path) -> None:
    first, second = History(run_dir, "7", 0), History(run_dir, "8", 0)
    first.started("submission-001", ["node1"], processes=1)
    second.started("submission-002", ["node2"], processes=1)
    first.ended("stopped", 0, None, signal="SIGTERM")
    (own,) = first.until_own()
    assert (own.job, own.ended, own.reason) == ("7", "stopped", None)
    assert [start.job for start in second.until_own()] == ["7", "8"]
