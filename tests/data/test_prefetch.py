"""Rows read ahead by worker processes: the same as without, errors by name, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slotmamba_data import MQARSetting, MQARSpec, Plan, PlanReader, Reading, Row, ShardWriter, Source, open_plan
from slotmamba_data.prefetch import PrefetchReader

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetch") / "shards"
    rng = np.random.default_rng(0)
    with ShardWriter(folder, vocab_size=1000, shard_bytes=5000) as writer:
        for length in rng.geometric(0.01, 300):
            writer.add(rng.integers(3, 1000, length))
    return folder


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def plan_of(shards: Path, **reading: Any) -> Plan:
    recall = MQARSpec((MQARSetting(20, 2),), vocab_size=512)
    sources = [Source("text", shards=shards), Source("recall", "mqar", mqar=recall)]
    return open_plan(sources, 50, seed=3, reading=Reading(shuffle_shards=3, **reading))


def content(row: Row) -> tuple[Any, ...]:
    return row.source, row.documents, row.tokens.tobytes(), row.labels.tobytes(), row.doc_start.tobytes(), row.skipped


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_read_what_the_process_itself_reads(shards: Path, workers: int) -> None:
    with closing(PlanReader(plan_of(shards))) as plain, closing(PrefetchReader(plan_of(shards), 0, workers)) as ahead:
        # Batches of one row, of fewer rows than workers, and of other sizes and parts than the one before.
        for rows, part, parts in [(12, 0, 1)] * 4 + [(12, 1, 3)] * 3 + [(1, 0, 1), (3, 2, 3), (8, 0, 2), (8, 0, 2)]:
            expected = [content(row) for row in plain.next_batch(rows, part, parts)]
            assert [content(row) for row in ahead.next_batch(rows, part, parts)] == expected
            assert ahead.state() == plain.state()
        # A reader that goes on where the other was: what was read ahead is no part of the state.
        with closing(PrefetchReader.from_state(ahead.plan, ahead.state())) as resumed:
            expected = [content(row) for row in plain.next_batch(12)]
            assert [content(row) for row in resumed.next_batch(12)] == expected


def test_errors_come_when_the_row_is_due_and_again(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "copy").mkdir()
    for path in shards.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "copy/shard-000004.tar"
    content_ = bytearray(damaged.read_bytes())
    content_[2000] ^= 1
    damaged.write_bytes(content_)

    def failed_at(reader: PlanReader) -> int:
        with pytest.raises(ValueError, match=r"shard-000004\.tar is damaged between bytes 0 and"):
            while reader.samples_consumed < 10_000:
                reader.next_batch(6)
        return reader.samples_consumed

    plan = plan_of(tmp_path / "copy")
    with closing(PlanReader(plan)) as plain, closing(PrefetchReader(plan_of(tmp_path / "copy"), 0, 2)) as ahead:
        assert failed_at(ahead) == failed_at(plain) > 6
        assert failed_at(ahead) == plain.samples_consumed, "the position stays"
    skipping = plan_of(tmp_path / "copy", on_corrupt="skip")
    with closing(PlanReader(skipping)) as plain, closing(PrefetchReader(skipping, 0, 2)) as ahead:
        rows = [plain.next_batch(50) for _ in range(10)]
        assert sum(row.skipped for batch in rows for row in batch) > 0
        for batch in rows:
            assert [content(row) for row in ahead.next_batch(50)] == [content(row) for row in batch]


def test_shards_that_vanish_before_the_workers_start(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards", vocab_size=10) as writer:
        writer.add(np.arange(10))
    plan = open_plan([Source("text", shards=tmp_path / "shards")], 5, seed=0)
    (tmp_path / "shards/manifest.json").unlink()
    with closing(PrefetchReader(plan, 0, 2)) as reader:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"source 'text': .*holds no manifest\.json"):
                reader.next_batch(4)


def worker_pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def test_killed_worker_is_named_and_signals_for_the_run_do_not_reach_workers(shards: Path) -> None:
    with closing(PrefetchReader(plan_of(shards), 0, 2)) as reader:
        expected = [content(row) for row in reader.next_batch(4)]
        for pid in worker_pids():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
        for _ in range(20):
            reader.next_batch(4)
        os.kill(worker_pids()[0], signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=r"data worker \d was killed by SIGKILL"):
            for _ in range(20):
                reader.next_batch(4)
        assert worker_pids() == []
        reader.samples_consumed = 0
        assert [content(row) for row in reader.next_batch(4)] == expected, "it starts others"


PROGRAM = """
import sys
from slotmamba_data import Source, open_plan
from slotmamba_data.prefetch import PrefetchReader
if __name__ == "__main__":
    plan = open_plan([Source("text", shards=sys.argv[1])], 50, seed=3)
    reader = PrefetchReader(plan, 0, 3)
    reader.next_batch(64)
    print(*[worker._process.pid for worker in reader._workers], flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(shards)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 3 and all(Path(f"/proc/{pid}").exists() for pid in pids)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
