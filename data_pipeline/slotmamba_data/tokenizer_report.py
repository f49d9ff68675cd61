"""How a tokenizer does on text: bytes per token, tokens per word and speed, source by source."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slotmamba_data.errors import InputError
from slotmamba_data.text import BadDocument, TextOptions, TextReader
from slotmamba_data.tokenizer import Tokenizer

MEASURED_BYTES = 1024 * 1024  # of each source, from its beginning


@dataclass(frozen=True)
class SourceMeasure:
    """What was measured on one source.

    Attributes:
        source: its name.
        documents, bytes, tokens, words: of the measured text; bytes of UTF-8, words between white space.
        bytes_per_token, tokens_per_word: their ratios; the second is also called fertility.
        not_given_back: documents that decoding does not give back as they were.
    """

    source: str
    documents: int
    bytes: int
    tokens: int
    words: int
    bytes_per_token: float
    tokens_per_word: float
    not_given_back: int


@dataclass(frozen=True)
class Measurement:
    """All sources, and bytes of text encoded a second on one core, which no two measurements agree on."""

    sources: tuple[SourceMeasure, ...]
    bytes_per_second: float = field(compare=False)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.sources)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / sum(each.tokens for each in self.sources)


@dataclass
class _Sums:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    words: int = 0
    not_given_back: int = 0


def measure(tokenizer: Tokenizer, inputs: Sequence[str | Path], limit: int | None = MEASURED_BYTES) -> Measurement:
    """Encode text and decode it again.

    Args:
        tokenizer: what is measured.
        inputs: what `text.open_text` takes.
        limit: of each source only the documents that begin within so many bytes; None is all.

    Raises:
        InputError: an input cannot be read, or there is no text.
    """
    sums: dict[str, _Sums] = {}
    seconds = 0.0
    for source, text in documents(inputs):
        own = sums.setdefault(source, _Sums())
        if not text or (limit is not None and own.bytes >= limit):
            continue
        began = time.perf_counter()
        tokens = tokenizer.encode(text)
        seconds += time.perf_counter() - began
        own.documents += 1
        own.bytes += len(text.encode())
        own.tokens += len(tokens)
        own.words += len(text.split())
        own.not_given_back += tokenizer.decode(tokens.tolist()) != tokenizer.prefix + text
    if not any(own.tokens for own in sums.values()):
        raise InputError("there is no text to measure the tokenizer on")
    sources = tuple(
        SourceMeasure(
            source=source,
            bytes_per_token=own.bytes / own.tokens,
            tokens_per_word=own.tokens / max(1, own.words),
            **vars(own),
        )
        for source, own in sums.items()
        if own.tokens
    )
    return Measurement(sources, sum(each.bytes for each in sources) / seconds)


def documents(inputs: Sequence[str | Path]) -> Iterable[tuple[str, str]]:
    """The documents of all inputs, each with its source: the field `source` where there is one, else the input."""
    for spec in inputs:
        for document in TextReader(str(spec), TextOptions()):
            if isinstance(document, BadDocument):
                raise InputError(document.message)
            yield document.source, document.text
