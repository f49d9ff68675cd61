"""The starts of a run; what training really logs is read in `test_runs`."""

from __future__ import annotations

from pathlib import Path

from slotmamba.runs.starts import End, Start, merged, read_starts, starts_in

LOG = """\
2026-11-25 08:00:00,500 INFO slotmamba.faults.logs: rank 0 of 2: process 29 on node1
2026-11-25 08:00:01,000 INFO slotmamba.progress: mqar: starts, 636,238 parameters on cpu of 2 processes, runs/mqar
2026-11-25 08:00:01,100 INFO slotmamba.progress: ends after step 40, where source 'text' is exhausted
2026-11-25 08:00:02,000 INFO slotmamba.progress: SIGUSR2 on rank 1: saved at step 7 of 40; the same command resumes: x
2026-11-25 08:00:02,100 INFO slotmamba.faults.logs: the process ends
2026-11-25 08:01:00,000 INFO slotmamba.faults.logs: rank 0 of 2: process 31 on node1
2026-11-25 08:01:01,000 INFO slotmamba.progress: mqar: resumes after step 7 (row 14), 636,238 parameters on cpu, x
2026-11-25 08:01:02,000 ERROR slotmamba.faults.logs: the process fails: RuntimeError: gloo has failed
Traceback (most recent call last):
RuntimeError: gloo has failed
the job ends: rank 1 has ended without a word (killed? out of memory?)
2026-11-25 08:02:00,000 INFO slotmamba.faults.logs: rank 0 of 2: process 33 on node3
"""


def test_ends() -> None:
    first, second, third = starts_in(LOG.splitlines(keepends=True))
    assert (first.processes, first.nodes, first.step, first.total) == (2, ("node1",), 0, 40)
    assert first.end == End("stopped", "SIGUSR2 on rank 1")
    assert (second.step, second.end) == (7, End("failed", "rank 1 has ended without a word (killed? out of memory?)"))
    assert (third.nodes, third.step, third.end) == (("node3",), None, None)
    assert second.time - first.time == 59.5


def test_nothing_left_to_do() -> None:
    lines = [LOG.splitlines()[0], "2026-11-25 08:00:02,100 INFO slotmamba.faults.logs: the process ends"]
    assert [start.end for start in starts_in(lines)] == [End("finished", "all steps were done")]


def test_no_log(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []


def test_jobs_say_more_of_the_end() -> None:
    by_hand = Start(10.0, 1, ("host",), step=0, end=End("stopped", "SIGINT"))
    trained = Start(21.0, 2, ("node1",), step=7, total=40, end=End("stopped", "SIGTERM"))
    failed = Start(41.0, 2, ("node1",), step=9, end=End("failed", "no space left"))
    jobs = [
        Start(20.0, 2, ("node1", "node2"), step=7, end=End("stopped", "preempted"), job="5"),
        Start(30.0, 2, ("node1", "node3"), step=7, end=End("failed", "training failed (exit code 2)"), job="5"),
        Start(40.0, 2, ("node1", "node3"), step=9, end=End("failed", "training failed (exit code 1)"), job="6"),
    ]
    first, second, third, fourth = merged([by_hand, trained, failed], jobs)
    assert first == by_hand
    assert second == Start(21.0, 2, ("node1", "node2"), 7, 40, End("stopped", "preempted"), "5")
    assert third == jobs[1]
    assert fourth.end == End("failed", "training failed (exit code 1): no space left")
