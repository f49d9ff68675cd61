"""The job of tokenising text, for `slotmamba_data.pieces`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from slotmamba_data.duplicates import duplicates_file, hash_texts, hashes_file, write_array
from slotmamba_data.errors import InputError
from slotmamba_data.inputs import Part
from slotmamba_data.pieces import Item, Report
from slotmamba_data.shards import checked_tokens
from slotmamba_data.text import BadDocument, Document, TextOptions, TextReader, locate
from slotmamba_data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextJob:
    """What a build of text does; arguments as for `build.build_text`.

    Attributes:
        pieces: the parts of the inputs that each piece has.
        duplicates: folder with the files that `find_duplicates` wrote, None to keep duplicates.
    """

    pieces: tuple[tuple[Part, ...], ...]
    options: TextOptions
    tokenizer: Tokenizer
    validation: float
    skip_bad: bool
    shard_bytes: int
    duplicates: Path | None
    unit: ClassVar[str] = "B"

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val") if self.validation else ("train",)

    @property
    def work(self) -> tuple[int, ...]:
        return tuple(sum(part.work for part in piece) for piece in self.pieces)

    def read(self, piece: int) -> _TextReading:
        return _TextReading(self, piece)

    def arrays(self, item: Item) -> dict[str, np.ndarray]:
        tokens = np.concatenate(([self.tokenizer.bos_id], self.tokenizer.encode(item.payload), [self.tokenizer.eos_id]))
        return {"tokens": checked_tokens(tokens, self.tokenizer.vocab_size)}

    def split_of(self, text: str) -> str:
        """Where a text goes: it depends on nothing else."""
        if not self.validation:
            return "train"
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
        return "val" if share < self.validation else "train"


class Documents:
    """The documents of a piece, part by part, and how much of its work is done."""

    def __init__(self, job: TextJob, piece: int) -> None:
        self._parts = job.pieces[piece]
        self._options = job.options
        self._before = 0.0
        self._reader: TextReader | None = None
        self._part = self._parts[0]
        self._size = 1

    def __iter__(self) -> Iterator[Document | BadDocument]:
        for part in self._parts:
            self._part = part
            self._reader = TextReader(part.spec, self._options, part.start, part.stop)
            if part.stop is None:
                with locate(part.spec) as path:
                    self._size = max(os.path.getsize(path), 1)
            else:
                self._size = part.stop - part.start
            yield from self._reader
            self._before += part.work
            self._reader = None

    @property
    def done(self) -> float:
        if self._reader is None:
            return self._before
        return self._before + self._part.work * min((self._reader.position - self._part.start) / self._size, 1)


class _TextReading:
    def __init__(self, job: TextJob, piece: int) -> None:
        self._job = job
        self._documents = Documents(job, piece)
        self._duplicates: set[int] = set()
        if job.duplicates is not None:
            self._duplicates = set(np.load(duplicates_file(job.duplicates, piece)).tolist())

    @property
    def done(self) -> float:
        return self._documents.done

    def __iter__(self) -> Iterator[Item]:
        for place, document in enumerate(self._documents):
            if isinstance(document, BadDocument):
                if not self._job.skip_bad:
                    raise InputError(document.message)
                yield Item("train", document.source, None, {}, document.reason)
                continue
            text, source, name = document
            reason = None if text else "empty"
            if place in self._duplicates and text:
                reason = "duplicate"
            yield Item(self._job.split_of(text), source, text, {} if name is None else {"id": name}, reason)


def hash_piece(job: TextJob, number: int, work: Path) -> Iterator[Report | None]:
    """Write down the hashes of a piece; yields reports, and None at last."""
    documents = Documents(job, number)
    write_array(hashes_file(work, number), hash_texts(_texts(documents)))
    yield Report(job.work[number], 0, 0)
    yield None


def _texts(documents: Documents) -> Iterator[str | None]:
    for document in documents:
        yield document.text if isinstance(document, Document) else None
