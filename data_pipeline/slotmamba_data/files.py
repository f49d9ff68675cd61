"""Durable files: a name is either absent or complete, and an error of the system names the file it is about."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block the name of `path`: a failed write (disk full, quota) carries none of its own."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary(path: Path) -> Path:
    """Where `path` is written before it is renamed to its own name."""
    return path.with_name(path.name + ".tmp")


def publish(path: Path) -> None:
    """Rename the synced temporary file of `path` to `path`, durably.

    Raises:
        OSError: the system refused, with the path in it.
    """
    os.replace(temporary(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` such that a reader sees the old file or the whole new one.

    Raises:
        OSError: the write failed; it names the path, and no temporary file stays behind.
    """
    partial = temporary(path)
    try:
        with naming(path):
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            publish(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256_hex(content: bytes) -> str:
    """SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
