"""Files of JSON objects, one a line, which are only ever appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slotmamba.notes import note_once


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raises OSError; otherwise the line has reached the disk."""
    line = json.dumps(record) + "\n"
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read() != b"\n":  # writing the last line was cut short
                line = "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def take_records(path: Path, take: Callable[[bytes], object]) -> None:
    """Gives `take` each line; none where there is no file. Those that it refuses with ValueError are left out, and a
    note says so.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    damaged = 0
    for line in filter(None, lines):
        try:
            take(line)
        except ValueError:
            damaged += 1
    if damaged:
        note_once(f"{path}: {damaged} line{'s are' if damaged > 1 else ' is'} damaged and left out")
