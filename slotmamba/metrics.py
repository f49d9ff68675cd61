"""metrics.jsonl: the record of a run, one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slotmamba.errors import InputError
from slotmamba_data.files import write_file

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends records to a file; each one has reached the operating system when `write` returns.

    So a killed process loses nothing; against a loss of power, call `sync` (at checkpoints, say). JSON has no NaN and
    no infinities: such values are written as null.
    """

    def __init__(self, path: Path, lossy: bool = False) -> None:
        """Opens ``path`` for appending and creates it where it is missing.

        Args:
            lossy: a record that cannot be written is no error but lost: a warning says so at the first, and another how
                many it were when there is room again.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
        self._lossy = lossy
        self._lost = 0
        self._descriptor = _open(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            OSError: it could not be written (a full disk, for instance); the error names the file, which then ends with
                the record before.
        """
        line = json.dumps({key: _json_value(value) for key, value in record.items()}, allow_nan=False) + "\n"
        end = os.fstat(self._descriptor).st_size
        try:
            _write_all(self._descriptor, line.encode())
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            self._fail(error)
            self._lost += 1
            return
        if self._lost:
            logger.warning("%s is written again; %d records of the meantime are lost", self.path, self._lost)
            self._lost = 0

    def sync(self) -> None:
        """Force the records to the disk; errors as for `write`."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error)

    def truncate_after(self, step: int, repeated: str | None = None) -> None:
        """Drop the records of later steps, and a torn last line: what a run resumed after ``step`` steps would repeat.

        Other lines that are no records move to a file beside this one, with ``.damaged`` after its name, and a warning.

        Args:
            repeated: kind of record that it will write for ``step`` itself, too.

        Raises:
            OSError: the file could not be rewritten; it keeps its old content.
        """
        kept: list[bytes] = []
        damaged: list[bytes] = []
        first: InputError | None = None
        for place, line in _lines(self.path):
            try:
                record = _parse(line, place)
            except InputError as error:
                first = first or error
                damaged.append(line + b"\n")
                continue
            again = repeated is not None and record.get("kind") == repeated
            if record["step"] < step or (record["step"] == step and not again):
                kept.append(line + b"\n")
        if first is not None:
            self._set_aside(damaged, first)
        write_file(self.path, b"".join(kept))
        self.close()
        self._descriptor = _open(self.path)

    def close(self) -> None:
        os.close(self._descriptor)

    def _fail(self, error: OSError) -> None:
        text = f"cannot write {self.path}: {error.strerror}"
        if not self._lossy:
            raise OSError(error.errno, text) from error
        if not self._lost:
            logger.warning("%s; training goes on, and records are lost until there is room", text)

    def _set_aside(self, damaged: list[bytes], first: InputError) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        write_file(aside, (aside.read_bytes() if aside.exists() else b"") + b"".join(damaged))
        more = f" with {len(damaged) - 1} more such lines" if len(damaged) > 1 else ""
        logger.warning("%s; moved to %s%s", first, aside, more)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A value that was not finite is None; a torn last line is left out.

    Raises:
        InputError: another line is not a JSON object with an integer ``step``; the error names file and line.
        OSError: the file cannot be read.
    """
    return [_parse(line, place) for place, line in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each whole line of the file, and what an error calls it."""
    # A whole line ends with a newline, so what follows the last one is empty or torn.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        yield f"{path}, line {number}", line


def readable_metrics(path: Path, last_bytes: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The records of a metrics.jsonl that are sound, and the number of lines that are not: to look at a run with, not
    to go on from.

    Args:
        last_bytes: only the lines that lie wholly in the last bytes of the file, so many; None for all.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = 0 if last_bytes is None else max(0, file.seek(0, os.SEEK_END) - last_bytes)
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    records, broken = [], 0
    for line in lines[1:] if start else lines:
        try:
            records.append(_parse(line, str(path)))
        except InputError:
            broken += 1
    return records, broken


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: expected a JSON object, found {line[:60]!r}") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{place}: expected a JSON object with an integer `step`, found {line[:60]!r}")
    return record


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
