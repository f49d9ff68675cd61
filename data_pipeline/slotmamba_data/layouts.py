"""Which parts of which documents make each row: documents joined and cut, fitted whole, or samples side by side.

A layout is about some documents, numbered from 0 as they are given, the empty ones among them without a place. It holds
a few numbers a document, and says what one row is in the time of a look-up.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from typing import Protocol

import numpy as np

Part = tuple[int, int, int]
"""A document and the tokens of it, from the first to the one past the last."""


class Layout(Protocol):
    """Rows of documents. `rows` depends on the lengths of the documents alone, not on their order."""

    rows: int

    def parts(self, row: int) -> list[Part]:
        """The parts of a row, from left to right."""
        ...

    def places(self, document: int) -> list[tuple[int, int, int]]:
        """Row, first token and the one past the last of each part of a document, found by looking at all documents."""
        ...

    def cut(self) -> int:
        """How many documents are in more than one row."""
        ...


class Concatenated:
    """The documents one after the other, cut wherever a row is full: no padding but after the last."""

    def __init__(self, counts: np.ndarray, order: np.ndarray, seq_len: int) -> None:
        """
        Args:
            counts: int64 [documents], tokens of each.
            order: int64 [documents], the documents as they follow one another.
            seq_len: tokens of a row.
        """
        self._order = order
        self._counts = counts[order]
        self._ends = np.cumsum(self._counts)
        self._tokens = int(self._ends[-1]) if len(self._ends) else 0
        self._seq_len = seq_len
        self.rows = -(-self._tokens // seq_len)

    def parts(self, row: int) -> list[Part]:
        position = row * self._seq_len
        stop = min(position + self._seq_len, self._tokens)
        first, last = np.searchsorted(self._ends, (position + 1, stop)).tolist()
        some = slice(first, last + 1)
        parts = []
        for document, end, count in zip(
            self._order[some].tolist(), self._ends[some].tolist(), self._counts[some].tolist(), strict=True
        ):
            begin = end - count
            if count:
                parts.append((document, max(position - begin, 0), min(stop - begin, count)))
        return parts

    def places(self, document: int) -> list[tuple[int, int, int]]:
        number = int(np.flatnonzero(self._order == document)[0])
        count, end = int(self._counts[number]), int(self._ends[number])
        begin, size = end - count, self._seq_len
        return [
            (row, max(row * size - begin, 0), min((row + 1) * size - begin, count))
            for row in range(begin // size, -(-end // size) if count else begin // size)
        ]

    def cut(self) -> int:
        first, last = (self._ends - self._counts) // self._seq_len, (self._ends - 1) // self._seq_len
        return int(np.count_nonzero(last > first))


class Table:
    """Rows that are written down, part by part."""

    def __init__(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray, row: np.ndarray) -> None:
        """All int64 [parts]; the parts of a row keep their order."""
        order = np.argsort(row, kind="stable")
        self._columns = document[order], start[order], stop[order]
        self._bounds = np.cumsum(np.concatenate(([0], np.bincount(row))))
        self.rows = len(self._bounds) - 1

    def parts(self, row: int) -> list[Part]:
        first, past = self._bounds[row : row + 2].tolist()
        return list(zip(*(column[first:past].tolist() for column in self._columns), strict=True))

    def places(self, document: int) -> list[tuple[int, int, int]]:
        documents, start, stop = self._columns
        found = np.flatnonzero(documents == document)
        rows = np.searchsorted(self._bounds, found, side="right") - 1
        return list(zip(rows.tolist(), start[found].tolist(), stop[found].tolist(), strict=True))

    def cut(self) -> int:
        return int(np.count_nonzero(np.bincount(self._columns[0]) > 1))


def best_fitted(counts: np.ndarray, order: np.ndarray, seq_len: int) -> Table:
    """Documents whole wherever a row can hold them: best-fit decreasing, equal lengths in the given order.

    Of a document longer than a row all but its rest fill rows of their own (Ding et al., "Fewer truncations improve
    language modeling", 2024).

    Args:
        counts: int64 [documents], tokens of each.
        order: int64 [documents].
        seq_len: tokens of a row.
    """
    pieces = -(-counts[order] // seq_len)
    document = np.repeat(order, pieces)
    start = seq_len * (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    stop = np.minimum(start + seq_len, counts[document])
    return Table(document, start, stop, best_fit(stop - start, seq_len))


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Best-fit decreasing: each item, the largest first, goes into the bin with the least room that is enough.

    Items of one size are placed together: the bin that took one of them is the tightest for the next, as long as it
    has room, so the bins of the tightest room fill up one after the other.

    Args:
        sizes: int64 [items], from 1 to `room`.
        room: of an empty bin.

    Returns:
        int64 [items], the bin of each; how many there are depends on the sizes alone.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    descending = sizes[order]
    starts = np.flatnonzero(np.diff(descending, prepend=room + 1))
    with_room: dict[int, np.ndarray] = {}  # bins by the room that is left in them
    rooms: list[int] = []  # the same rooms, rising
    opened = 0
    for first, past in itertools.pairwise([*starts.tolist(), len(sizes)]):
        size = int(descending[first])
        while first < past:
            place = bisect_left(rooms, size)
            if place < len(rooms):
                left = rooms.pop(place)
                candidates = with_room.pop(left)
            else:  # as many new bins as it takes
                left = room
                candidates = np.arange(opened, opened - (first - past) // (room // size))
            each = left // size
            used = candidates[: -((first - past) // each)]
            opened = max(opened, int(used[-1]) + 1)
            taken = min(past - first, len(used) * each)
            bins[order[first : first + taken]] = np.repeat(used, each)[:taken]
            first += taken
            in_last = taken - (len(used) - 1) * each
            for which, rest in (
                (used[:-1], left - each * size),
                (used[-1:], left - in_last * size),
                (candidates[len(used) :], left),
            ):
                if rest and len(which):
                    if rest in with_room:
                        which = np.concatenate((with_room[rest], which))
                    else:
                        insort(rooms, rest)
                    with_room[rest] = which
    return bins


def side_by_side(counts: np.ndarray, order: np.ndarray, seq_len: int, one_a_row: bool) -> Table:
    """Samples whole, in rows with others of their length, as many as fit: an order never changes how many rows.

    Args:
        counts: int64 [documents], tokens of each, at most `seq_len`.
        order: int64 [documents].
        seq_len: tokens of a row.
        one_a_row: no two in a row.
    """
    order = order[counts[order] > 0]
    order = order[np.argsort(counts[order], kind="stable")]
    row = np.empty(len(order), dtype=np.int64)
    rows = 0
    lengths, firsts = np.unique(counts[order], return_index=True)
    bounds = itertools.pairwise([*firsts.tolist(), len(order)])
    for length, (first, past) in zip(lengths.tolist(), bounds, strict=True):
        row[first:past] = rows + np.arange(past - first) // (1 if one_a_row else seq_len // length)
        rows = int(row[past - 1]) + 1
    return Table(order, np.zeros(len(order), dtype=np.int64), counts[order], row)
