"""Where text comes from: plain, compressed and JSON-lines files, and the embedded corpus, as streams of documents."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

from slotmamba_data.errors import InputError

DOCUMENT_BYTES = 16 * 1024
EMBEDDED = {f"austen:{split}": f"austen.{split}.txt.xz" for split in ("train", "val", "test")}
_COMPRESSED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}


def open_text(spec: str | Path, *, document_bytes: int | None = DOCUMENT_BYTES) -> Iterator[str]:
    """The documents of one input, in order.

    Args:
        spec: a UTF-8 text file; a `.jsonl` file, of which each line's `text` is a document; either of them compressed
            as `.xz` or `.gz`; or `austen:train`, `austen:val`, `austen:test`, the embedded corpus.
        document_bytes: a plain text is cut at the first blank line after so many bytes, or at the end of a line where
            four times as many hold no blank line. Joined, the documents are the file again. None keeps the file whole.

    Raises:
        InputError: there is no such file or embedded text (at the call), or its content is not what its name says
            (while reading).
    """
    located = _locate(spec)
    if document_bytes is not None and document_bytes < 1:
        raise InputError(f"document_bytes={document_bytes}: expected at least 1")
    return _documents(located, document_bytes)


def _locate(spec: str | Path) -> AbstractContextManager[Path]:
    """The file of an input, for as long as the context is open."""
    word = str(spec)
    if word.startswith("austen:"):
        if word not in EMBEDDED:
            raise InputError(f"there is no embedded text {word!r}: expected one of {', '.join(EMBEDDED)}")
        return resources.as_file(resources.files(__package__).joinpath("corpus", EMBEDDED[word]))
    path = Path(spec)
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"input {word} {reason}: expected a text file or one of {', '.join(EMBEDDED)}")
    return nullcontext(path)


def _documents(located: AbstractContextManager[Path], document_bytes: int | None) -> Iterator[str]:
    with located as path:
        opener = _COMPRESSED.get(path.suffix, open)
        suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
        try:
            # newline="" keeps every line end as it is: the documents must give the file back.
            with opener(path, "rt", encoding="utf-8", newline="") as lines:
                if suffix == ".jsonl":
                    yield from _json_documents(lines, path)
                elif document_bytes is None:
                    yield lines.read()
                else:
                    yield from _cut(lines, document_bytes)
        except UnicodeDecodeError as error:
            raise InputError(f"input {path} is not UTF-8 text: {error.reason}") from error
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise InputError(f"input {path} is not a complete compressed file: {error}") from error


def _json_documents(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except json.JSONDecodeError as error:
            raise InputError(f"input {path}, line {number}: not JSON ({error})") from error
        except (KeyError, TypeError) as error:
            raise InputError(f"input {path}, line {number}: expected an object with the field `text`") from error
        if not isinstance(text, str):
            raise InputError(f"input {path}, line {number}: `text` is {type(text).__name__}, expected a string")
        if not is_unicode(text):
            raise InputError(f"input {path}, line {number}: `text` holds half a surrogate pair, which is no character")
        yield text


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: a JSON escape can smuggle in half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _cut(lines: Iterable[str], document_bytes: int) -> Iterator[str]:
    document: list[str] = []
    size = 0
    after_blank = False
    for line in lines:
        blank = not line.strip()
        if (size >= document_bytes and after_blank and not blank) or size >= 4 * document_bytes:
            yield "".join(document)
            document, size = [], 0
        document.append(line)
        size += len(line.encode())
        after_blank = blank
    if document:
        yield "".join(document)
