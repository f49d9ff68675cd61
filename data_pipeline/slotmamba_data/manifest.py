"""The manifest of a folder of shards: the file that says the folder is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from slotmamba_data.errors import InputError
from slotmamba_data.files import write_file

FORMAT = 2
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest."""

    name: str
    bytes: int
    sha256: str
    index: str
    index_sha256: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceCount:
    """Documents and tokens of a source, and what of it was left out: documents by reason, such as `duplicate`."""

    documents: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


def add_counts(counts: dict[str, SourceCount], more: Mapping[str, SourceCount]) -> None:
    """Add `more` to `counts`, source by source."""
    for name, added in more.items():
        old = counts.get(name, SourceCount())
        skipped = dict(old.skipped)
        for reason, number in added.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + number
        counts[name] = SourceCount(old.documents + added.documents, old.tokens + added.tokens, skipped)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a folder.

    Attributes:
        format: version of this layout.
        kind: `lm`, documents of text; `mqar`, recall samples with stored labels.
        form: `decoder`, or `seq2seq` where every sample has encoder tokens.
        vocab_size: every token is below.
        tokenizer: SHA-256 of the tokenizer's file, None for recall data.
        token_dtype: NumPy type of the stored tokens.
        documents, tokens: totals; encoder tokens are not counted.
        shards: the shards, in order.
        sources: what each source gave, by its name.
        about: how the folder was made.
    """

    format: int
    kind: Literal["lm", "mqar"]
    form: Literal["decoder", "seq2seq"]
    vocab_size: int
    tokenizer: str | None
    token_dtype: str
    documents: int
    tokens: int
    shards: tuple[ShardEntry, ...]
    sources: dict[str, SourceCount]
    about: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Declare `folder` complete.

        Raises:
            OSError: the manifest could not be written; the folder stays incomplete.
        """
        write_file(folder / MANIFEST_NAME, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def parse(cls, content: bytes, name: str) -> Self:
        """The manifest in the content of the file `name`.

        Raises:
            InputError: it is not one that this version can read; says which command builds one.
        """
        try:
            values = json.loads(content)
            version = values["format"]
            values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
            if version == FORMAT and values.keys() == {each.name for each in fields(cls)}:
                values["sources"] = {name: SourceCount(**count) for name, count in values["sources"].items()}
                return cls(**values)._checked()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{name} is not a manifest of shards ({error}): build the folder again") from error
        raise InputError(f"{name} has format {version}, expected {FORMAT}: build the folder again with this version")

    def _checked(self) -> Self:
        """Raises ValueError: a value cannot be, or totals are not the sums over the shards."""
        if self.kind not in ("lm", "mqar") or self.form not in ("decoder", "seq2seq"):
            raise ValueError(f"kind and form are {self.kind!r} and {self.form!r}")
        if self.token_dtype not in ("uint16", "uint32"):
            raise ValueError(f"token_dtype is {self.token_dtype!r}")
        for name, least in (("vocab_size", 1), ("documents", 0), ("tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}")
        for name in ("documents", "tokens"):
            total = sum(getattr(entry, name) for entry in self.shards)
            if getattr(self, name) != total:
                raise ValueError(f"{name} is {getattr(self, name)}, the shards have {total}")
        return self
