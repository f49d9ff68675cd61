"""Build shards piece by piece, in any number of processes; what is finished stays finished after a kill.

A job is divided into pieces in a way that depends on its input alone. Each piece becomes shards of its own, so the
number of processes changes nothing. While a piece is built, each of its finished shards is recorded beside it; a piece
that is built again goes on behind the last of them without tokenising the documents before. A finished piece is
recorded as a whole.
"""

from __future__ import annotations

import fcntl
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from slotmamba_data.files import write_file
from slotmamba_data.manifest import ShardEntry, SourceCount, add_counts
from slotmamba_data.shards import Shard
from slotmamba_data.worker import Handler, Worker

_REPORT_SECONDS = 0.2


class Item(NamedTuple):
    """A document of a piece that was read, not tokenised yet.

    Attributes:
        split: where it goes.
        source: what it is counted for.
        payload: what `Job.arrays` makes tokens of.
        meta: what is stored with it beside its source.
        skipped: the reason why it is left out, None if it is not.
    """

    split: str
    source: str
    payload: Any
    meta: dict[str, Any]
    skipped: str | None = None


class Reading(Protocol):
    """The items of a piece, and how much of its work is done."""

    def __iter__(self) -> Iterator[Item]: ...

    @property
    def done(self) -> float: ...


class Job(Protocol):
    """What is built; it can be pickled.

    Attributes:
        splits: the splits that its items have.
        work: the size of each piece, in the unit of `Reading.done`.
        unit: that unit.
        shard_bytes: size at which a shard is closed.
    """

    @property
    def splits(self) -> tuple[str, ...]: ...

    @property
    def work(self) -> tuple[int, ...]: ...

    @property
    def unit(self) -> str: ...

    @property
    def shard_bytes(self) -> int: ...

    def read(self, piece: int) -> Reading:
        """The items of a piece, the same each time."""
        ...

    def arrays(self, item: Item) -> dict[str, np.ndarray]:
        """The arrays of an item as `Shard.add` takes them."""
        ...


class Report(NamedTuple):
    """What happened since the last report."""

    work: float
    documents: int
    tokens: int

    def since(self, before: Report) -> Report:
        """What happened since an earlier sum."""
        return Report(self.work - before.work, self.documents - before.documents, self.tokens - before.tokens)


@dataclass
class Built:
    """A finished piece: by split its shards, and the counts of its sources."""

    shards: dict[str, list[ShardEntry]] = field(default_factory=dict)
    sources: dict[str, dict[str, SourceCount]] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: bytes) -> Built:
        values = json.loads(content)
        return cls(
            {split: [ShardEntry(**entry) for entry in entries] for split, entries in values["shards"].items()},
            {split: _counts(counts) for split, counts in values["sources"].items()},
        )


def _counts(values: dict[str, Any]) -> dict[str, SourceCount]:
    return {name: SourceCount(**count) for name, count in values.items()}


def for_each(
    function: Callable[[Any, int, Path], Iterator[Report | Any]],
    job: Any,
    work: Path,
    numbers: Sequence[int],
    workers: int,
    on_report: Callable[[Report], None],
) -> Iterator[tuple[int, Any]]:
    """Call `function(job, number, work)` for all numbers, in this process or `workers` others, and yield each result,
    the last thing that the function yields, with its number, in the order in which they finish.

    Raises:
        ChildProcessError: a worker died.
        Exception: what the function raised; nothing is worked on any more then.
    """
    if workers < 2 or len(numbers) < 2:
        for number in numbers:
            for message in function(job, number, work):
                if isinstance(message, Report):
                    on_report(message)
                else:
                    yield number, message
        return
    pool = [
        Worker(f"build worker {rank}", functools.partial(_handler, function, job, work))
        for rank in range(min(workers, len(numbers)))
    ]
    try:
        yield from _spread(pool, numbers, on_report)
    finally:
        for worker in pool:
            worker.close()


def _handler(function: Callable[[Any, int, Path], Iterator[Any]], job: Any, work: Path) -> Handler:
    lock = open(workers_lock(work), "a")  # noqa: SIM115 (held as long as the process lives)
    fcntl.flock(lock, fcntl.LOCK_SH)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if not parent.is_alive():
        os._exit(1)  # somebody else may build in the folder by now

    def handle(number: int) -> Iterator[Any]:
        assert not lock.closed
        return function(job, number, work)

    return handle


def workers_lock(work: Path) -> Path:
    """The file on which all workers hold a shared lock: those of a build that was killed may live a moment longer."""
    return work / "workers.lock"


def _spread(
    pool: list[Worker], numbers: Sequence[int], on_report: Callable[[Report], None]
) -> Iterator[tuple[int, Any]]:
    waiting = iter(numbers)
    busy: dict[Any, tuple[Worker, int]] = {}

    def give(worker: Worker) -> None:
        number = next(waiting, None)
        if number is not None:
            worker.send(number)
            busy[worker.connection] = worker, number

    for worker in pool:
        give(worker)
    while busy:
        for connection in wait(list(busy)):
            worker, number = busy[connection]
            message = worker.receive()
            if isinstance(message, Report):
                on_report(message)
            else:
                del busy[connection]
                give(worker)
                yield number, message


def build_piece(job: Job, number: int, work: Path) -> Iterator[Report | Built]:
    """Build a piece into `work/SPLIT/`, going on with what is there; yields reports, and at last what was built."""
    writers = {split: _SplitWriter(job, work / split, number) for split in job.splits}
    reading = job.read(number)
    built = Built(sources={split: {} for split in job.splits})
    reported, clock = Report(0.0, 0, 0), time.monotonic()
    documents = tokens = 0
    try:
        for place, item in enumerate(reading):
            if item.skipped is not None:
                add_counts(built.sources[item.split], {item.source: SourceCount(skipped={item.skipped: 1})})
                continue
            documents += 1
            tokens += writers[item.split].add(place, item)
            if time.monotonic() - clock > _REPORT_SECONDS:
                now, clock = Report(reading.done, documents, tokens), time.monotonic()
                yield now.since(reported)
                reported = now
        for split, writer in writers.items():
            built.shards[split] = writer.close()
            add_counts(built.sources[split], writer.sources)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        raise
    write_file(piece_record(work, number), json.dumps(asdict(built)).encode())
    yield Report(job.work[number], documents, tokens).since(reported)
    yield built


def piece_record(work: Path, number: int) -> Path:
    """The file that says that a piece is finished."""
    return work / f"piece-{number:06d}.json"


class _SplitWriter:
    """Writes the shards of one piece and split; the first ones may be there already."""

    def __init__(self, job: Job, folder: Path, number: int) -> None:
        self._job, self._folder, self._number = job, folder, number
        self._entries: list[ShardEntry] = []
        self._shard: Shard | None = None
        self._past = 0  # items before this one are in finished shards, if they belong to the split
        self.sources: dict[str, SourceCount] = {}
        folder.mkdir(parents=True, exist_ok=True)
        while (record := self._record(len(self._entries))).is_file():
            values = json.loads(record.read_bytes())
            self._entries.append(ShardEntry(**values["entry"]))
            self._past = values["past"]
            add_counts(self.sources, _counts(values["sources"]))

    def _name(self, shard: int) -> str:
        return f"{self._number:06d}-{shard:04d}"

    def _record(self, shard: int) -> Path:
        return self._folder / f"shard-{self._name(shard)}.json"

    def add(self, place: int, item: Item) -> int:
        """Add item number `place` of the piece unless it is there; returns how many tokens were added."""
        if place < self._past:
            return 0
        if self._shard is None:
            name = self._name(len(self._entries))
            self._shard = Shard(self._folder / f"shard-{name}.tar", name)
        arrays = self._job.arrays(item)
        self._shard.add(arrays, {"source": item.source, **item.meta})
        self._past = place + 1
        if self._shard.full or self._shard.size >= self._job.shard_bytes:
            self._finish()
        return len(arrays["tokens"])

    def _finish(self) -> None:
        assert self._shard is not None
        entry = self._shard.finish()
        sources = {name: asdict(count) for name, count in self._shard.sources.items()}
        record = {"entry": asdict(entry), "past": self._past, "sources": sources}
        write_file(self._record(len(self._entries)), json.dumps(record).encode())
        self._entries.append(entry)
        add_counts(self.sources, self._shard.sources)
        self._shard = None

    def close(self) -> list[ShardEntry]:
        if self._shard is not None:
            self._finish()
        return self._entries

    def discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()
