"""Where text comes from: plain, compressed, JSON-lines and Parquet files, and the embedded corpus, as documents."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from slotmamba_data.errors import InputError

DOCUMENT_BYTES = 16 * 1024
EMBEDDED = {f"austen:{split}": f"austen.{split}.txt.xz" for split in ("train", "val", "test")}
_ROWS = 1024  # of a Parquet file that are read at once
INSTALL_DATA = "is not installed: pip install 'slotmamba[data]'"


class Document(NamedTuple):
    """A document of an input: its text, the source it is counted for, and the `id` it has in the input, if any."""

    text: str
    source: str
    id: str | int | None


class BadDocument(NamedTuple):
    """A place of an input that holds no document: the reason in two or three words, where and why in a sentence, and
    the input."""

    reason: str
    message: str
    source: str


@dataclass(frozen=True)
class TextOptions:
    """How documents are made of inputs.

    Attributes:
        document_bytes: a plain text is cut at the first blank line after so many bytes, or at the end of a line where
            four times as many hold no blank line. Joined, the documents are the file again. None keeps the file whole.
        text_field: field of a JSON object, or column of a Parquet file, that holds the text.

    Raises:
        InputError: documents of no bytes.
    """

    document_bytes: int | None = DOCUMENT_BYTES
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.document_bytes is not None and self.document_bytes < 1:
            raise InputError(f"document_bytes={self.document_bytes}: expected at least 1")


def open_text(
    spec: str | Path, *, document_bytes: int | None = DOCUMENT_BYTES, text_field: str = "text"
) -> Iterator[str]:
    """The texts of the documents of one input, in order.

    Args:
        spec: a UTF-8 text file; a `.jsonl` file, of which each line has a document's text in a field; either of them
            compressed as `.xz`, `.gz` or `.zst`; a `.parquet` file with a column of texts; or `austen:train`,
            `austen:val`, `austen:test`, the embedded corpus.
        document_bytes, text_field: as in `TextOptions`.

    Raises:
        InputError: there is no such file or embedded text (at the call), or its content is not what its name says
            (while reading).
    """
    options = TextOptions(document_bytes, text_field)
    locate(spec)
    return _texts(TextReader(str(spec), options))


def _texts(reader: TextReader) -> Iterator[str]:
    for document in reader:
        if isinstance(document, BadDocument):
            raise InputError(document.message)
        yield document.text


def locate(spec: str | Path) -> AbstractContextManager[Path]:
    """The file of an input, for as long as the context is open.

    Raises:
        InputError: there is none.
    """
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


class TextReader:
    """The documents of an input, or of a part of it; iterated once.

    Args:
        spec: as for `open_text`.
        options: how documents are made.
        start, stop: of an uncompressed `.jsonl` file only the lines that begin from byte `start` to `stop - 1`; of a
            `.parquet` file only those row groups.

    Attributes:
        position: bytes of the file that are read so far; row groups of a Parquet file.
    """

    def __init__(self, spec: str, options: TextOptions, start: int = 0, stop: int | None = None) -> None:
        self._spec, self._options, self._start, self._stop = spec, options, start, stop
        self.position = start

    def __iter__(self) -> Iterator[Document | BadDocument]:
        with locate(self._spec) as path:
            if path.suffix == ".parquet":
                yield from self._parquet(path)
                return
            suffixes = path.suffixes[-2:]
            kind = suffixes[0] if path.suffix in _COMPRESSED and len(suffixes) == 2 else path.suffix
            with open(path, "rb", buffering=2**18) as raw, closing(_decompressed(raw, path)) as content:
                documents = self._json(content, path) if kind == ".jsonl" else self._plain(content, path)
                try:
                    for document in documents:
                        self.position = raw.tell()
                        yield document
                except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
                    raise InputError(f"input {path} is not a complete compressed file: {error}") from error

    def _plain(self, content: BinaryIO, path: Path) -> Iterator[Document]:
        # newline="" keeps every line end as it is: the documents must give the file back.
        lines = io.TextIOWrapper(content, encoding="utf-8", newline="")
        size = self._options.document_bytes
        try:
            for number, text in enumerate((lines.read(),) if size is None else _cut(lines, size)):
                yield Document(text, self._spec, number)
        except UnicodeDecodeError as error:
            raise InputError(f"input {path} is not UTF-8 text: {error.reason}") from error

    def _json(self, content: BinaryIO, path: Path) -> Iterator[Document | BadDocument]:
        where = "line"
        if self._start:  # the line that begins before belongs to the part before
            where = f"line after byte {self._start}, number"
            content.seek(self._start - 1)
            content.readline()
        number = 0
        while (self._stop is None or content.tell() < self._stop) and (line := content.readline()):
            number += 1
            if line.strip():
                yield _json_document(line, self._options.text_field, self._spec, f"input {path}, {where} {number}")

    def _parquet(self, path: Path) -> Iterator[Document | BadDocument]:
        parquet, arrow_error = _pyarrow()
        field = self._options.text_field
        reached = ""
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if field not in names:
                    raise InputError(f"input {path} has no column {field!r}, but {', '.join(map(repr, names))}")
                columns = [name for name in (field, "source", "id") if name in names]
                stop = file.num_row_groups if self._stop is None else self._stop
                for group in range(self._start, stop):
                    row = 0
                    reached = f" beyond row {row} of group {group}"
                    for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                        reached = f" beyond row {row + batch.num_rows} of group {group}"
                        for values in _rows(batch):
                            row += 1
                            where = f"input {path}, row {row} of group {group}"
                            if isinstance(values, UnicodeDecodeError):
                                message = f"{where}: not UTF-8 text ({values.reason})"
                                yield BadDocument("not UTF-8", message, self._spec)
                            else:
                                yield _document(values, field, self._spec, where)
                    self.position = group + 1
        except (arrow_error, OSError) as error:  # of a damaged page pyarrow says so by an OSError
            raise InputError(f"input {path} is not a Parquet file that can be read{reached}: {error}") from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch of Arrow columns, or why one cannot be read."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # of some row, before the first is given
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def parquet_groups(path: Path) -> list[int]:
    """The bytes of each row group of a Parquet file, uncompressed.

    Raises:
        InputError: it is not a Parquet file, or pyarrow is not installed.
    """
    parquet, arrow_error = _pyarrow()
    try:
        metadata = parquet.read_metadata(path)
    except (arrow_error, OSError) as error:  # of a damaged footer pyarrow says so by an OSError
        raise InputError(f"input {path} is not a Parquet file that can be read: {error}") from error
    return [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]


def _pyarrow() -> tuple[Any, type[Exception]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise InputError(f"pyarrow, which reads Parquet files, {INSTALL_DATA}") from error
    return parquet, pyarrow.ArrowException


def _zstd(raw: BinaryIO) -> Any:
    try:
        from slotmamba_data.zstd_file import ZstdFile
    except ModuleNotFoundError as error:
        raise InputError(f"zstandard, which reads .zst files, {INSTALL_DATA}") from error
    return io.BufferedReader(ZstdFile(raw), buffer_size=2**18)


_COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _zstd}


def is_compressed(path: Path) -> bool:
    """Whether the file has to be decompressed from its beginning."""
    return path.suffix in _COMPRESSED


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    return _COMPRESSED[path.suffix](raw) if is_compressed(path) else raw


def _json_document(line: bytes, field: str, spec: str, where: str) -> Document | BadDocument:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadDocument("not UTF-8", f"{where}: not UTF-8 text ({error.reason})", spec)
    except (ValueError, RecursionError) as error:  # a ValueError too: a number of more digits than Python reads
        return BadDocument("not JSON", f"{where}: not JSON ({error})", spec)
    if not isinstance(values, dict) or field not in values:
        return BadDocument(f"no {field}", f"{where}: expected an object with the field `{field}`", spec)
    return _document(values, field, spec, where)


def _document(values: dict[str, Any], field: str, spec: str, where: str) -> Document | BadDocument:
    text, source, name = values[field], values.get("source"), values.get("id")
    if not isinstance(text, str):
        message = f"{where}: `{field}` is {type(text).__name__}, expected a string"
        return BadDocument("text is no string", message, spec)
    if not is_unicode(text):
        message = f"{where}: `{field}` holds half a surrogate pair, which is no character"
        return BadDocument("half a character", message, spec)
    return Document(
        text,
        source if isinstance(source, str) and is_unicode(source) else spec,
        name if isinstance(name, int) or (isinstance(name, str) and is_unicode(name)) else None,
    )


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
