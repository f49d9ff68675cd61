"""What `slotmamba data inspect` finds out about folders of shards and about plans."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from slotmamba_data.plan import Plan, PlanReader
from slotmamba_data.prefetch import PrefetchReader
from slotmamba_data.shard_reader import ShardFolder

EARLY_ROWS = 10_000


@dataclass(frozen=True)
class Lengths:
    """How many documents have how many tokens: bucket 0 has the empty ones, bucket b those of 2^(b-1) to 2^b - 1."""

    buckets: tuple[int, ...]

    @classmethod
    def of(cls, folders: Iterable[ShardFolder]) -> Lengths:
        """Of all documents of some folders; reads their indexes, one at a time."""
        total = np.zeros(1, dtype=np.int64)
        for folder in folders:
            for shard in range(len(folder.manifest.shards)):
                counts = folder.index(shard).counts
                buckets = np.bincount(np.ceil(np.log2(counts + 1)).astype(np.int64), minlength=len(total))
                total = buckets + np.pad(total, (0, len(buckets) - len(total)))
        return cls(tuple(total.tolist()))

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Least and most tokens of each bucket that has documents, and how many it has."""
        for bucket, documents in enumerate(self.buckets):
            if documents:
                yield (2 ** (bucket - 1), 2**bucket - 1, documents) if bucket else (0, 0, documents)


def count_duplicates(folders: Iterable[ShardFolder]) -> tuple[int, int]:
    """Documents whose tokens an earlier one has too, and their tokens; reads all shards, keeps 16 bytes a document."""
    digests: list[bytes] = []
    counts: list[np.ndarray] = []
    for folder in folders:
        for shard, entry in enumerate(folder.manifest.shards):
            index = folder.index(shard)
            stream = folder.read_span(shard, 0, entry.tokens).astype("<u4", copy=False)
            for end, count in zip(index.ends.tolist(), index.counts.tolist(), strict=True):
                digests.append(hashlib.blake2b(stream[end - count : end].tobytes(), digest_size=16).digest())
            counts.append(index.counts)
    if not digests:
        return 0, 0
    _, firsts = np.unique(np.array(digests, dtype="V16"), return_index=True)
    lengths = np.concatenate(counts)
    return len(digests) - len(firsts), int(lengths.sum() - lengths[firsts].sum())


@dataclass(frozen=True)
class PlannedSource:
    """A source of a plan over a run.

    Attributes:
        documents, tokens, rows_per_epoch: of an epoch; None without end.
        pad_share: share of its rows' positions that are padding.
        cut_share: share of its documents that are in more than one row; None without end.
        asked: shares of the rows by the weights at the beginning and at the end of the run.
        realised: shares of the first 10,000 rows (or of the run where it is shorter) and of all rows of the run.
        tokens_share: share of the tokens of all rows of the run, padding left out.
        epochs: epochs in the run, None without end.
    """

    name: str
    kind: str
    documents: int | None
    tokens: int | None
    rows_per_epoch: int | None
    pad_share: float
    cut_share: float | None
    asked: tuple[float, float]
    realised: tuple[float, float]
    tokens_share: float
    epochs: float | None


def planned_sources(plan: Plan, rows: int) -> list[PlannedSource]:
    """What a run of `rows` rows makes of each source; reads all indexes."""
    early, whole = plan.progress(min(EARLY_ROWS, rows)), plan.progress(rows)
    weights = [piece.weights for piece in plan.turns.eras[-1].pieces if piece.first < rows]
    first, last = weights[0], weights[-1]
    reports = plan.describe()
    used = {report.name: whole[report.name].share * (1 - report.contents.pad_share) for report in reports}
    found = []
    for index, (report, now, later) in enumerate(zip(reports, first, last, strict=True)):
        contents = report.contents
        cut = None if not contents.documents else plan.cut_documents(index) / contents.documents
        found.append(
            PlannedSource(
                name=report.name,
                kind=report.kind,
                documents=contents.documents,
                tokens=contents.tokens,
                rows_per_epoch=contents.rows_per_epoch,
                pad_share=contents.pad_share,
                cut_share=cut,
                asked=(now / sum(first), later / sum(last)),
                realised=(early[report.name].share, whole[report.name].share),
                tokens_share=used[report.name] / sum(used.values()),
                epochs=whole[report.name].epochs,
            )
        )
    return found


def shares_over_time(plan: Plan, rows: int, windows: int = 100) -> tuple[list[int], np.ndarray]:
    """The rows at which windows of a run end, and each source's share of each: float [windows, sources]."""
    ends = sorted({rows * (window + 1) // windows for window in range(windows)} - {0})
    counts = np.array([plan.turns.counts(end) for end in ends])
    gained = np.diff(counts, axis=0, prepend=np.zeros((1, counts.shape[1]), dtype=counts.dtype))
    return ends, gained / gained.sum(axis=1, keepdims=True)


def throughput(plan: Plan, batch: int, batches: int, workers: Sequence[int]) -> dict[int, float]:
    """Tokens a second, padding included, at which batches of `batch` rows arrive in this process, read by so many
    workers; 0 reads them here. What they do before the first batch is not counted."""
    speeds = {}
    for count in workers:
        reader = PrefetchReader(plan, 0, count) if count else PlanReader(plan)
        try:
            reader.next_batch(batch)
            began = time.perf_counter()
            for _ in range(batches):
                reader.next_batch(batch)
            speeds[count] = batches * batch * plan.seq_len / (time.perf_counter() - began)
        finally:
            reader.close()
    return speeds
