"""A row: documents one after the other, padded to its length, with everything a model needs to keep them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from slotmamba_data.mqar import IGNORE, PAD


class DocumentPart(NamedTuple):
    """Tokens `start` to `stop - 1` of a document of a source, in one of its epochs."""

    epoch: int
    document: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a batch, T = seq_len tokens.

    Attributes:
        tokens: int32 [T]; 0 on padding.
        labels: int32 [T], what to predict at each token: the next token of the same document, also where that is the
            first of a later row, or the value at a recall query; -100 where there is no loss.
        doc_start: int32 [T], index in the row of the first token of the token's document; a document continued from an
            earlier row starts at 0, and padding is a document of its own.
        valid: bool [T], False on padding.
        source: index of the row's source in the plan.
        documents: the documents in the row, in order.
        encoder_tokens: int32 [S] in the seq2seq form, S the same for all rows of a source; else None.
        encoder_valid: bool [S], False on the encoder's padding; else None.
        skipped: documents that could not be read and were left out, or parts of them were; one that is cut into several
            rows counts in the one of them that comes first.
    """

    tokens: np.ndarray
    labels: np.ndarray
    doc_start: np.ndarray
    valid: np.ndarray
    source: int
    documents: tuple[DocumentPart, ...]
    encoder_tokens: np.ndarray | None = None
    encoder_valid: np.ndarray | None = None
    skipped: int = 0


class RowPacker:
    """Fills one row from left to right."""

    def __init__(self, seq_len: int) -> None:
        self._tokens = np.full(seq_len, PAD, dtype=np.int32)
        self._labels = np.full(seq_len, IGNORE, dtype=np.int32)
        self._doc_start = np.zeros(seq_len, dtype=np.int32)
        self._parts: list[DocumentPart] = []
        self._used = 0
        self.skipped = 0

    def add(self, tokens: np.ndarray, labels: np.ndarray, part: DocumentPart) -> None:
        """Append (a part of) a document: integer tokens [n] and as many labels, or fewer: the rest have no loss."""
        stop = self._used + len(tokens)
        assert stop <= len(self._tokens) and len(labels) <= len(tokens)
        self._tokens[self._used : stop] = tokens
        self._labels[self._used : self._used + len(labels)] = labels
        self._doc_start[self._used : stop] = self._used
        self._parts.append(part)
        self._used = stop

    def row(self, source: int, encoder: np.ndarray | None = None, encoder_length: int | None = None) -> Row:
        """The row, padded; `encoder` tokens are padded to `encoder_length`."""
        self._doc_start[self._used :] = self._used
        valid = np.arange(len(self._tokens)) < self._used
        row = self._tokens, self._labels, self._doc_start, valid, source, tuple(self._parts)
        if encoder is None:
            return Row(*row, skipped=self.skipped)
        assert encoder_length is not None
        padded = np.full(encoder_length, PAD, dtype=np.int32)
        padded[: len(encoder)] = encoder
        return Row(*row, padded, np.arange(encoder_length) < len(encoder), self.skipped)
