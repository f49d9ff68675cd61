"""Logs of several ranks, and outputs of jobs, in the order of time; with a real job in `tests/slurm/test_runs.py`."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from slotmamba.runs.logs import RunLogs, shown


def at(second: int, text: str) -> str:
    return f"2026-11-25 08:00:{second:02d},000 INFO slotmamba.x: {text}"


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def test_ranks_in_the_order_of_time(tmp_path: Path) -> None:
    write(tmp_path / "logs" / "rank-00000.log", at(1, "a"), "Traceback", at(4, "b"))
    write(tmp_path / "logs" / "rank-00001.log", at(2, "c"), at(3, "d"), "the job ends: e")
    lines = shown(RunLogs(tmp_path).new(), prefixed=True)
    assert lines == [
        f"[0] {at(1, 'a')}",
        "[0] Traceback",
        f"[1] {at(2, 'c')}",
        f"[1] {at(3, 'd')}",
        "[1] the job ends: e",
        f"[0] {at(4, 'b')}",
    ]


def test_outputs_of_jobs_between_them(tmp_path: Path) -> None:
    """What the log has too is there once, and tells when the rest came."""
    write(tmp_path / "logs" / "rank-00000.log", at(1, "starts"), at(2, "step 1"), at(2, "warns"), "in two lines")
    write(tmp_path / "logs" / "rank-00001.log", at(3, "c"))
    output = tmp_path / "slurm" / "5_0_log.out"
    write(output, "task", "starts", "srun: hm", "step 1", "warns", "in two lines", at(4, "stopped"), "queued")
    early = tmp_path / "slurm" / "4_0_log.out"  # of a job that failed before it trained
    write(early, "ImportError")
    os.utime(early, (0, datetime(2026, 11, 25, 7, 59).timestamp()))
    texts = [line.rpartition(": ")[2] for line in shown(RunLogs(tmp_path).new(), prefixed=False)]
    assert texts == ["ImportError", "starts", "task", "hm", "step 1", "warns", "in two lines", "c", "stopped", "queued"]


def test_what_comes_later(tmp_path: Path) -> None:
    log, output = tmp_path / "logs" / "rank-00000.log", tmp_path / "slurm" / "5_0_log.out"
    logs = RunLogs(tmp_path)
    assert logs.new() == []
    write(log, at(1, "a"))
    with log.open("a") as file:
        file.write("half a ")
    write(output, "task", "a")
    assert shown(logs.new(), prefixed=True) == [f"[0] {at(1, 'a')}", "[0] task"]
    write(log, "line", at(2, "b"))
    write(output, "b", "c")
    write(tmp_path / "logs" / "rank-00001.log", at(2, "d"))
    assert shown(logs.new(), prefixed=True) == ["[0] half a line", f"[0] {at(2, 'b')}", f"[1] {at(2, 'd')}", "[0] c"]
    with log.open("a") as file:
        file.write("no end")
    assert logs.new() == []
    assert shown(logs.new(last=True), prefixed=False) == ["no end"]


def test_one_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path / "logs" / f"rank-{rank:05d}.log", at(rank, f"logged by {rank}"))
        write(tmp_path / "slurm" / f"7_1_{rank}_log.out", f"printed by {rank}")
    assert shown(RunLogs(tmp_path, rank=1).new(), prefixed=False) == [at(1, "logged by 1"), "printed by 1"]
