"""The manifest of a folder of shards: the file that says the folder is complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, write_file

FORMAT = 1
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
class Manifest:
    """What `manifest.json` says of a folder.

    Attributes:
        format: version of this layout.
        kind: `lm`, documents of text; `mqar`, recall samples with stored labels.
        form: `decoder`, or `seq2seq` where every sample has encoder tokens.
        vocab_size: every token is below.
        tokenizer: SHA-256 of the sentencepiece model, None for recall data.
        token_dtype: NumPy type of the stored tokens.
        documents, tokens: totals; encoder tokens are not counted.
        shards: the shards, in order.
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
    about: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Declare `folder` complete.

        Raises:
            OSError: the manifest could not be written; the folder stays incomplete.
        """
        write_file(folder / MANIFEST_NAME, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a complete folder.

        Raises:
            InputError: there is none, or it is not one that this version can read; says which command builds one.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            reason = "is a file, not a folder of shards" if folder.exists() else "does not exist"
            if folder.is_dir():
                reason = "holds no manifest.json, so it is not a complete folder of shards"
            inner = [name for name in ("train", "val") if (folder / name / MANIFEST_NAME).is_file()]
            hint = f"; did you mean {folder / inner[0]}?" if inner else ": build it with `slotmamba data build`"
            raise InputError(f"{folder} {reason}{hint}")
        with naming(path):
            content = path.read_bytes()
        try:
            values = json.loads(content)
            version = values["format"]
            values["shards"] = tuple(ShardEntry(**entry) for entry in values["shards"])
            if version == FORMAT and values.keys() == {field.name for field in fields(cls)}:
                return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a manifest of shards ({error}): build the folder again") from error
        raise InputError(f"{path} has format {version}, expected {FORMAT}: build the folder again with this version")
