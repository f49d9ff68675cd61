"""metrics.jsonl: the record of a run, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slotmamba.errors import InputError
from slotmamba_data.files import write_file


class MetricsLog:
    """Appends records to a file; each one has reached the operating system when `write` returns.

    So a killed process loses nothing; against a loss of power, call `sync` (at checkpoints, say). JSON has no NaN and
    no infinities: such values are written as null.
    """

    def __init__(self, path: Path) -> None:
        """Opens ``path`` for appending and creates it where it is missing.

        Raises:
            OSError: it cannot be opened.
        """
        self.path = path
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
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Force the records to the disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    def truncate_after(self, step: int, repeated: str | None = None) -> None:
        """Drop the records of later steps, and a torn last line: what a run resumed after ``step`` steps would repeat.

        Args:
            repeated: kind of record that it will write for ``step`` itself, too.

        Raises:
            InputError: as `read_metrics`.
            OSError: the file could not be rewritten; it keeps its old content.
        """
        records = [
            record
            for record in read_metrics(self.path)
            if record["step"] < step or (record["step"] == step and (repeated is None or record["kind"] != repeated))
        ]
        write_file(self.path, "".join(json.dumps(record) + "\n" for record in records).encode())
        self.close()
        self._descriptor = _open(self.path)

    def close(self) -> None:
        os.close(self._descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A value that was not finite is None; a torn last line is left out.

    Raises:
        InputError: another line is not a JSON object with an integer ``step``; the error names file and line.
        OSError: the file cannot be read.
    """
    # A whole line ends with a newline, so what follows the last one is empty or torn.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


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
