"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: write beside it, fsync, rename, fsync the folder.

    Raises:
        OSError: it could not be written; the error names ``path``, which keeps its old content.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of ``value`` as indented JSON.

    Raises:
        ValueError: ``value`` holds a NaN or an infinity, which JSON does not have.
        TypeError: ``value`` holds something that is not JSON.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def fsync_folder(path: Path) -> None:
    """Make the names in a folder (created, renamed, deleted) survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
