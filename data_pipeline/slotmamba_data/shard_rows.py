"""Rows of documents in shards, a group of shards at a time: shuffled within the group, and read from nowhere else."""

from __future__ import annotations

import functools
import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from slotmamba_data.errors import CorruptShardError, InputError
from slotmamba_data.layouts import Concatenated, Layout, best_fitted, side_by_side
from slotmamba_data.manifest import Manifest
from slotmamba_data.mqar import PAD
from slotmamba_data.packing import DocumentPart, Row, RowPacker
from slotmamba_data.randomness import derive_key, permutation
from slotmamba_data.row_source import Contents
from slotmamba_data.shard_reader import ShardFolder

if TYPE_CHECKING:
    from slotmamba_data.remote import RemoteSettings

logger = logging.getLogger(__name__)

Packing = Literal["concat", "best_fit"]
OnCorrupt = Literal["error", "skip"]
SHUFFLE_SHARDS = 16


@dataclass(frozen=True)
class Reading:
    """How rows are made of shards.

    Attributes:
        packing: text is joined and cut (`concat`), or documents stay whole where a row can hold them (`best_fit`).
            Recall samples are always whole, beside others of their length.
        shuffle_shards: size of the groups of shards within which documents and rows are shuffled.
        on_corrupt: `error`, or `skip`: what cannot be read is left out of its row.
        remote: how shards behind a URL are read.

    Raises:
        InputError: a group of no shards.
    """

    packing: Packing = "concat"
    shuffle_shards: int = SHUFFLE_SHARDS
    on_corrupt: OnCorrupt = "error"
    remote: RemoteSettings | None = None

    def __post_init__(self) -> None:
        if self.shuffle_shards < 1:
            raise InputError(f"shuffle_shards={self.shuffle_shards}: expected at least 1")


@dataclass(frozen=True)
class _Shuffled:
    """A group in one epoch: its documents laid out, and its rows in the order in which they come.

    `bounds` says where the documents of each of its shards begin among those of the group, and where the last ends.
    """

    shards: list[int]
    bounds: list[int]
    counts: np.ndarray  # int64 [documents], tokens of each
    layout: Layout
    rows: np.ndarray  # int64 [rows]

    @functools.cached_property
    def place_of_row(self) -> np.ndarray:
        """int64 [rows], where each row of the layout comes."""
        return np.argsort(self.rows)


class _Epoch:
    """The groups of one epoch in their order, counted as far as somebody asked."""

    def __init__(self, order: list[int], rows_of: Callable[[int], int]) -> None:
        self._order = order
        self._rows_of = rows_of
        self._ends: list[int] = []

    def after(self, group: int) -> list[int]:
        """The group that follows a group in the epoch; none follows the last."""
        place = self._order.index(group) + 1
        return self._order[place : place + 1]

    def find(self, place: int) -> tuple[int, int] | None:
        """The group of row `place` of the epoch and the row in the group, None past the last."""
        while not self._ends or self._ends[-1] <= place:
            if len(self._ends) == len(self._order):
                return None
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self._rows_of(self._order[len(self._ends)]))
        number = bisect_right(self._ends, place)
        return self._order[number], place - (self._ends[number - 1] if number else 0)


class ShardRows:
    """Text or recall samples from shards. An epoch has every token of every document in exactly one row.

    The shards form groups, the same in every epoch. In each epoch the groups come in a new order; within a group the
    documents are shuffled, laid out in rows, and the rows shuffled. So a reader needs one group at a time, whose order
    is in memory (some 40 bytes a document of a group, and of two groups where one ends), and of the others 8 bytes a
    group. How many rows a group has follows from the manifest where text is cut and from its indexes elsewhere. Those
    are read up to the group that is asked for, not before.
    """

    def __init__(self, folder: ShardFolder, index: int, seq_len: int, seed: int, stream: str, reading: Reading) -> None:
        manifest = folder.manifest
        self.folder, self._index, self._seq_len, self._seed, self._stream = folder, index, seq_len, seed, stream
        self._recall = manifest.kind == "mqar"
        self._seq2seq = manifest.form == "seq2seq"
        self._reading = reading
        self._groups = self._grouped(len(manifest.shards), reading.shuffle_shards)
        self._total: int | None = None
        self._rows_of = functools.cache(self._count_rows)
        self._epoch = functools.lru_cache(maxsize=2)(self._order)
        self._shuffled = functools.lru_cache(maxsize=2)(self._shuffle)
        if not manifest.tokens:
            raise InputError(f"{folder.location} holds no token")
        self.vocab_size = manifest.vocab_size
        self.tokenizer = manifest.tokenizer
        self.encoder_length: int | None = None
        if self._recall:
            self._check_samples()
        self.components = _components(manifest) | {"shuffle_shards": str(reading.shuffle_shards)}
        if not self._recall:
            self.components["packing"] = reading.packing
        if reading.on_corrupt == "skip":
            self.components["on_corrupt"] = "skip"

    def _grouped(self, shards: int, size: int) -> list[np.ndarray]:
        """The shards of each group: drawn from all over the folder, whose order often means something."""
        order = permutation(derive_key("groups", self._seed, self._stream), shards)
        return [np.sort(group) for group in np.array_split(order, max(1, -(-shards // size)))]

    def _check_samples(self) -> None:
        """Looks through all indexes once for the longest sample and the longest encoder input."""
        indexes = [self.folder.index(shard) for shard in range(len(self.folder.manifest.shards))]
        longest = max(int(index.counts.max(initial=0)) for index in indexes)
        if longest > self._seq_len:
            raise InputError(
                f"{self.folder.location} has samples of {longest} tokens, which do not fit rows of {self._seq_len}"
            )
        if self._seq2seq:
            encoders = [index.encoder_counts for index in indexes if index.encoder_counts is not None]
            self.encoder_length = max(int(counts.max(initial=0)) for counts in encoders)

    def row(self, number: int) -> Row:
        epoch, group, row = self._locate(number)
        shuffled = self._shuffled(epoch, group)
        packer = RowPacker(self._seq_len)
        encoder = None
        for document, start, stop in shuffled.layout.parts(int(shuffled.rows[row])):
            place = bisect_right(shuffled.bounds, document) - 1
            shard, own = shuffled.shards[place], document - shuffled.bounds[place]
            part = DocumentPart(epoch, int(self.folder.first[shard]) + own, start, stop)
            try:
                if self._recall:
                    tokens, labels = self.folder.read(shard, own), self.folder.read(shard, own, array="labels")
                    if self._seq2seq:
                        encoder = self.folder.read(shard, own, array="encoder")
                    packer.add(tokens, labels, part)
                else:
                    tokens = self._read_text(shuffled, document, start, stop)
                    packer.add(tokens[: stop - start], tokens[1:], part)
            except CorruptShardError as error:
                if self._reading.on_corrupt == "error":
                    raise
                logger.warning("left out of row %d: %s", number, error)
                packer.skipped += self._counts_here(shuffled, document, row)
        if self._seq2seq and encoder is None:
            encoder = np.full(1, PAD)  # one token: attention to none at all has no value
        return packer.row(self._index, encoder, self.encoder_length)

    def _read_text(self, shuffled: _Shuffled, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens of a part of a group's document, and the one after it, its last label, where there is one."""
        place = bisect_right(shuffled.bounds, document) - 1
        past = min(stop + 1, int(shuffled.counts[document]))
        return self.folder.read(shuffled.shards[place], document - shuffled.bounds[place], start, past)

    def _counts_here(self, shuffled: _Shuffled, document: int, row: int) -> bool:
        """Whether of all rows with a part of the document that cannot be read this one, by its place, comes first."""
        for other, start, stop in shuffled.layout.places(document):
            if shuffled.place_of_row[other] < row:
                try:
                    self._read_text(shuffled, document, start, stop)
                except CorruptShardError:
                    return False
        return True

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Epoch, group and row of the group, before their shuffle, of a row of the source."""
        if self._total is None:
            found = self._epoch(0).find(number)
            if found is not None:
                return 0, *found
        epoch, place = divmod(number, self.rows_per_epoch())
        found = self._epoch(epoch).find(place)
        assert found is not None
        return epoch, *found

    def rows_per_epoch(self) -> int:
        if self._total is None:
            self._total = sum(map(self._rows_of, range(len(self._groups))))
        return self._total

    def _order(self, epoch: int) -> _Epoch:
        key = derive_key("order of groups", self._seed, self._stream, epoch)
        return _Epoch(permutation(key, len(self._groups)).tolist(), self._rows_of)

    def _count_rows(self, group: int) -> int:
        if self._cuts:
            tokens = sum(self.folder.manifest.shards[shard].tokens for shard in self._groups[group])
            return -(-tokens // self._seq_len)
        counts = self._counts(group)
        return self._laid_out(counts, np.arange(len(counts))).rows

    @property
    def _cuts(self) -> bool:
        return self._reading.packing == "concat" and not self._recall

    def _shuffle(self, epoch: int, group: int) -> _Shuffled:
        key = self._seed, self._stream, epoch, group
        expected = [group, *self._epoch(epoch).after(group)]
        self.folder.expect(np.concatenate([self._groups[each] for each in expected]).tolist())
        counts = self._counts(group)
        layout = self._laid_out(counts, permutation(derive_key("documents", *key), len(counts)))
        rows = permutation(derive_key("rows", *key), layout.rows)
        shards = self._groups[group].tolist()
        bounds = np.cumsum([0] + [self.folder.manifest.shards[shard].documents for shard in shards]).tolist()
        return _Shuffled(shards, bounds, counts, layout, rows)

    def _laid_out(self, counts: np.ndarray, order: np.ndarray) -> Layout:
        if self._recall:
            return side_by_side(counts, order, self._seq_len, one_a_row=self._seq2seq)
        return (Concatenated if self._cuts else best_fitted)(counts, order, self._seq_len)

    def _counts(self, group: int) -> np.ndarray:
        """int64, tokens of the documents of all shards of a group, one shard after the other."""
        return np.concatenate([self.folder.index(shard).counts for shard in self._groups[group].tolist()])

    def epochs(self, rows: int) -> float:
        if self._cuts or self._recall:
            return rows / self.rows_per_epoch()
        return rows * self._seq_len / self.folder.manifest.tokens

    def contents(self) -> Contents:
        manifest, rows = self.folder.manifest, self.rows_per_epoch()
        padding = 1 - manifest.tokens / (rows * self._seq_len)
        return Contents(manifest.documents, manifest.tokens, rows, padding)

    def cut_documents(self) -> int:
        return sum(self._shuffle(0, group).layout.cut() for group in range(len(self._groups)))

    def origin(self, part: DocumentPart) -> str:
        shard, own = self.folder.locate(part.document)
        name = self.folder.manifest.shards[shard].name
        known = "".join(f", {key} {value}" for key, value in self.folder.meta(shard, own).items())
        return f"{self.folder.where(name)}, document {own} of the shard{known}"

    def close(self) -> None:
        self.folder.close()


def _components(manifest: Manifest) -> dict[str, str]:
    shards = {f"shard {entry.name}": entry.sha256 for entry in manifest.shards}
    return {"kind": manifest.kind, "form": manifest.form, "number of shards": str(len(manifest.shards)), **shards}
