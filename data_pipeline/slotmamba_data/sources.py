"""The sources of a plan: each maps the number of a row within the source to the row."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from slotmamba_data.errors import InputError
from slotmamba_data.manifest import Manifest
from slotmamba_data.mqar import MQARSamples, generate_mqar
from slotmamba_data.mqar_spec import MQARSpec
from slotmamba_data.packing import DocumentPart, Row, RowPacker
from slotmamba_data.randomness import derive_key, permutation
from slotmamba_data.schedule import Schedule
from slotmamba_data.shard_reader import ShardFolder

_CHUNK_ROWS = 16  # rows of generated samples that are made together


@dataclass(frozen=True)
class Source:
    """A source as a recipe names it: text or recall samples from shards, or recall samples made on the fly.

    Attributes:
        name: name in logs; also part of the seed of everything drawn for the source.
        kind: `lm` or `mqar`.
        weight: share of the rows, and so of the tokens, relative to the other sources.
        shards: folder written by `slotmamba data build`.
        mqar: generated samples instead.

    Raises:
        InputError: neither or both of shards and mqar, or lm without shards.
    """

    name: str
    kind: Literal["lm", "mqar"] = "lm"
    weight: float = 1.0
    shards: str | Path | None = None
    mqar: MQARSpec | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise InputError(f"source {self.name!r}: weight={self.weight}, expected more than 0")
        if (self.shards is None) == (self.mqar is None):
            raise InputError(f"source {self.name!r} needs either `shards` or `mqar` settings, one of them")
        if self.kind == "lm" and self.shards is None:
            raise InputError(
                f"source {self.name!r} of kind lm needs `shards`, a folder written by `slotmamba data build`"
            )


@dataclass(frozen=True)
class Contents:
    """What a source holds. An endless source, generated samples, has neither documents, tokens nor epochs (None).

    Attributes:
        documents, tokens: of one epoch; encoder tokens are not counted.
        rows_per_epoch: rows of one epoch.
        pad_share: share of the rows' positions that are padding.
    """

    documents: int | None
    tokens: int | None
    rows_per_epoch: int | None
    pad_share: float


class RowSource(Protocol):
    """What a plan needs of a source.

    Attributes:
        vocab_size: every token is below.
        tokenizer: digest of the tokenizer of its text, None for recall samples.
        encoder_length: encoder tokens of its rows, None without an encoder.
        components: name and digest (or value) of everything that decides the rows.
        contents: what it holds.
    """

    vocab_size: int
    tokenizer: str | None
    encoder_length: int | None
    components: dict[str, str]
    contents: Contents

    def row(self, number: int) -> Row:
        """Row `number` >= 0 of the source; epochs follow one another."""
        ...

    def close(self) -> None:
        """Release open files."""
        ...


def open_source(source: Source, index: int, seq_len: int, seed: int, split: str) -> RowSource:
    """Open source number `index` of a plan.

    Raises:
        InputError: the shards are not there, damaged, of another kind, or a sample is longer than a row.
    """
    stream = f"{split}/{source.name}"
    try:
        if source.mqar is not None:
            return GeneratedRecall(source.mqar, index, seq_len, seed, stream)
        assert source.shards is not None
        folder = ShardFolder(source.shards)
        if folder.manifest.kind != source.kind:
            raise InputError(
                f"{folder.path} holds data of kind {folder.manifest.kind}, the source is of kind {source.kind}"
            )
        rows = TextRows if source.kind == "lm" else StoredRecall
        return rows(folder, index, seq_len, seed, stream)
    except InputError as error:
        raise InputError(f"source {source.name!r}: {error}") from error


def _shard_components(manifest: Manifest) -> dict[str, str]:
    shards = {f"shard {entry.name}": f"{entry.sha256}" for entry in manifest.shards}
    return {"kind": manifest.kind, "form": manifest.form, "number of shards": str(len(manifest.shards)), **shards}


class _TextEpoch(NamedTuple):
    order: np.ndarray  # int64 [documents], the documents as they follow one another
    ends: np.ndarray  # int64 [documents], where each of them ends in the stream of tokens
    rows: np.ndarray  # int64 [rows], which cut of the stream each row is


class TextRows:
    """Text: in each epoch the documents are shuffled, joined and cut into rows, and the rows are shuffled.

    Every token of every document is in exactly one row of an epoch, and is the label of exactly one position but for
    the first of each document, which nothing predicts.
    """

    def __init__(self, folder: ShardFolder, index: int, seq_len: int, seed: int, stream: str) -> None:
        manifest = folder.manifest
        self._folder, self._index, self._seq_len, self._seed, self._stream = folder, index, seq_len, seed, stream
        self._rows = -(-manifest.tokens // seq_len)
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)
        self.vocab_size = manifest.vocab_size
        self.tokenizer = manifest.tokenizer
        self.encoder_length: int | None = None
        self.components = _shard_components(manifest)
        padding = 1 - manifest.tokens / (self._rows * seq_len)
        self.contents = Contents(manifest.documents, manifest.tokens, self._rows, padding)

    def _shuffle(self, epoch: int) -> _TextEpoch:
        key = self._seed, self._stream, epoch
        order = permutation(derive_key("documents", *key), len(self._folder.counts))
        return _TextEpoch(
            order=order,
            ends=np.cumsum(self._folder.counts[order]),
            rows=permutation(derive_key("rows", *key), self._rows),
        )

    def row(self, number: int) -> Row:
        epoch, place = divmod(number, self._rows)
        order, ends, rows = self._epoch(epoch)
        position = int(rows[place]) * self._seq_len
        stop = min(position + self._seq_len, int(ends[-1]))
        packer = RowPacker(self._seq_len)
        rank = int(np.searchsorted(ends, position, side="right"))
        while position < stop:
            document = int(order[rank])
            count = int(self._folder.counts[document])
            first = position - int(ends[rank]) + count
            past = min(count, first + stop - position)
            tokens = self._folder.tokens(document, first, min(past + 1, count))  # and the last one's label
            packer.add(tokens[: past - first], tokens[1:], DocumentPart(epoch, document, first, past))
            position += past - first
            rank += 1
        return packer.row(self._index)

    def close(self) -> None:
        self._folder.close()


class GeneratedRecall:
    """Recall samples made on the fly, without end: a row holds as many whole samples of one setting as fit.

    The settings take turns by weight. In the seq2seq form a row is one sample. A sample's document number is unique in
    the source: sample number * settings + setting.
    """

    def __init__(self, spec: MQARSpec, index: int, seq_len: int, seed: int, stream: str) -> None:
        longest = max(setting.length for setting in spec.settings)
        if longest > seq_len:
            raise InputError(f"samples of {longest} tokens do not fit rows of {seq_len}")
        self._spec, self._index, self._seq_len, self._seed, self._stream = spec, index, seq_len, seed, stream
        self._schedule = Schedule([setting.weight for setting in spec.settings])
        self._per_row = [1 if spec.form == "seq2seq" else seq_len // setting.length for setting in spec.settings]
        self._chunk = functools.lru_cache(maxsize=len(spec.settings))(self._generate)
        self.vocab_size = spec.vocab_size
        self.tokenizer: str | None = None
        self.encoder_length = spec.encoder_length
        self.components = {
            "kind": "mqar, generated",
            **{name: str(getattr(spec, name)) for name in ("form", "vocab_size", "fillers", "power")},
            "order of settings": ", ".join(f"({setting.length}, {setting.pairs})" for setting in spec.settings),
            **{f"weight of ({each.length}, {each.pairs})": repr(float(each.weight)) for each in spec.settings},
        }
        self.contents = Contents(None, None, None, self._pad_share())

    def _pad_share(self) -> float:
        used = total = 0.0
        for setting, per_row in zip(self._spec.settings, self._per_row, strict=True):
            tokens = setting.length
            if self._spec.form == "seq2seq":
                tokens = min(setting.length, 1 + setting.pairs)
            used += setting.weight * per_row * tokens
            total += setting.weight * self._seq_len
        return 1 - used / total

    def row(self, number: int) -> Row:
        which, turn = self._schedule.locate(number)
        chunk, place = divmod(turn, _CHUNK_ROWS)
        samples = self._chunk(which, chunk)
        per_row = self._per_row[which]
        packer = RowPacker(self._seq_len)
        for i in range(place * per_row, (place + 1) * per_row):
            document = (chunk * _CHUNK_ROWS * per_row + i) * len(self._spec.settings) + which
            packer.add(samples.tokens[i], samples.labels[i], DocumentPart(0, document, 0, samples.tokens.shape[1]))
        encoder = None if samples.encoder is None else samples.encoder[place]
        return packer.row(self._index, encoder, self.encoder_length)

    def _generate(self, which: int, chunk: int) -> MQARSamples:
        """The samples of `_CHUNK_ROWS` successive rows of a setting: many at once cost little more than one."""
        count = _CHUNK_ROWS * self._per_row[which]
        numbers = chunk * count + np.arange(count)
        return generate_mqar(self._spec, self._spec.settings[which], numbers, seed=self._seed, stream=self._stream)

    def close(self) -> None:
        pass


class _RecallEpoch(NamedTuple):
    documents: list[np.ndarray]  # int64, for each length its documents, shuffled
    rows: np.ndarray  # int64 [rows], a permutation: rows of the first length come first, then of the second ...


class StoredRecall:
    """Recall samples from shards, whole: a row holds as many samples of one length as fit, one in the seq2seq form.

    In each epoch the samples of a length are shuffled, and then the rows of all lengths; every sample is in exactly one
    row. Samples of different lengths do not share a row, so that an epoch has the same number of rows each time.
    """

    def __init__(self, folder: ShardFolder, index: int, seq_len: int, seed: int, stream: str) -> None:
        manifest = folder.manifest
        self._folder, self._index, self._seq_len, self._seed, self._stream = folder, index, seq_len, seed, stream
        self._lengths = np.unique(folder.counts)
        if self._lengths[-1] > seq_len:
            raise InputError(
                f"{folder.path} has samples of {self._lengths[-1]} tokens, which do not fit rows of {seq_len}"
            )
        seq2seq = manifest.form == "seq2seq"
        self._per_row = [1 if seq2seq else seq_len // int(length) for length in self._lengths]
        self._groups = [np.flatnonzero(folder.counts == length) for length in self._lengths]
        rows = [-(-len(group) // per_row) for group, per_row in zip(self._groups, self._per_row, strict=True)]
        self._ends = np.cumsum(rows)
        self._rows = int(self._ends[-1])
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)
        self.vocab_size = manifest.vocab_size
        self.tokenizer: str | None = None
        self.encoder_length = None if folder.encoder_counts is None else int(folder.encoder_counts.max())
        self.components = _shard_components(manifest)
        padding = 1 - manifest.tokens / (self._rows * seq_len)
        self.contents = Contents(manifest.documents, manifest.tokens, self._rows, padding)

    def _shuffle(self, epoch: int) -> _RecallEpoch:
        key = self._seed, self._stream, epoch
        documents = [
            group[permutation(derive_key("documents", *key, int(length)), len(group))]
            for length, group in zip(self._lengths, self._groups, strict=True)
        ]
        return _RecallEpoch(documents, permutation(derive_key("rows", *key), self._rows))

    def row(self, number: int) -> Row:
        epoch, place = divmod(number, self._rows)
        documents, rows = self._epoch(epoch)
        which = int(np.searchsorted(self._ends, rows[place], side="right"))
        rank = int(rows[place] - (self._ends[which - 1] if which else 0)) * self._per_row[which]
        packer = RowPacker(self._seq_len)
        encoder = None
        for document in map(int, documents[which][rank : rank + self._per_row[which]]):
            tokens = self._folder.tokens(document)
            packer.add(tokens, self._folder.labels(document), DocumentPart(epoch, document, 0, len(tokens)))
            if self.encoder_length is not None:
                encoder = self._folder.encoder_tokens(document)
        return packer.row(self._index, encoder, self.encoder_length)

    def close(self) -> None:
        self._folder.close()
