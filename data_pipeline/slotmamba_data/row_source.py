"""What a plan needs of a source of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from slotmamba_data.packing import DocumentPart, Row
from slotmamba_data.shard_reader import ShardFolder


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
    """One source of a plan.

    Attributes:
        vocab_size: every token is below.
        tokenizer: digest of the tokenizer of its text, None for recall samples.
        encoder_length: encoder tokens of its rows, None without an encoder.
        components: name and digest (or value) of everything that decides the rows.
    """

    vocab_size: int
    tokenizer: str | None
    encoder_length: int | None
    components: dict[str, str]

    @property
    def folder(self) -> ShardFolder | None:
        """Its shards, None where samples are generated."""
        ...

    def row(self, number: int) -> Row:
        """Row `number` >= 0 of the source; epochs follow one another."""
        ...

    def rows_per_epoch(self) -> int | None:
        """Rows of an epoch, None without end. Where documents are fitted whole it takes all indexes to count them."""
        ...

    def epochs(self, rows: int) -> float | None:
        """How many epochs so many rows are, None without end; as if there were no padding where rows take indexes to
        count."""
        ...

    def contents(self) -> Contents:
        """What it holds, as `rows_per_epoch`."""
        ...

    def cut_documents(self) -> int:
        """How many documents are in more than one row of the first epoch; reads all indexes."""
        ...

    def origin(self, part: DocumentPart) -> str:
        """Where a part of a row comes from, in words."""
        ...

    def close(self) -> None:
        """Release open files."""
        ...
