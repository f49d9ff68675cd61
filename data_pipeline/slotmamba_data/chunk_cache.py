"""A bounded folder of pieces of remote files, shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from slotmamba_data.errors import InputError
from slotmamba_data.files import naming

_LOOKS = 16  # the folder is looked through whenever a 16th of its limit was added
_LOCKS = 64
_USED = 60.0  # seconds after which a use is noted again


class ChunkCache:
    """Files by key, the longest unused of which go when they are too many.

    Whoever reads a chunk must be able to tell whether it is what it should be (shards have CRCs): nothing here is
    synced, so a machine that loses power may leave chunks of zeros behind.

    Args:
        folder: made when missing, for this user alone.
        limit: bytes it may hold; each process may exceed it by a 16th.

    Raises:
        InputError: the folder belongs to another user.
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._unseen = limit  # bytes that may have been added since the folder was looked through
        self._counting = threading.Lock()
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.geteuid():
                raise InputError(f"the cache of shards {folder} belongs to another user: choose another one")

    def read(self, key: str, first: int, past: int) -> bytes | None:
        """Bytes `first` to `past - 1` of a chunk, fewer where it ends before; None when it is not there."""
        try:
            descriptor = os.open(self._folder / key, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(descriptor).st_mtime < time.time() - _USED:
                os.utime(descriptor)
            return os.pread(descriptor, past - first, first)
        finally:
            os.close(descriptor)

    def has(self, key: str) -> bool:
        """Whether a chunk is there."""
        return (self._folder / key).exists()

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Keep all other threads and processes from the same block for the same chunk (and a few others)."""
        path = self._folder / f"lock-{zlib.crc32(key.encode()) % _LOCKS:02d}"
        with naming(path), open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def put(self, key: str, content: bytes) -> None:
        """Keep a chunk.

        Raises:
            OSError: it cannot be written; names the file.
        """
        path = self._folder / key
        with naming(path):
            descriptor, partial = tempfile.mkstemp(dir=self._folder, prefix=key, suffix=".tmp")
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                os.rename(partial, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
                raise
        with self._counting:
            self._unseen += len(content)
            if self._unseen * _LOOKS >= self._limit:
                self._unseen = 0
                self._shrink()

    def forget(self, key: str) -> None:
        """Remove a chunk that is not what it should be."""
        (self._folder / key).unlink(missing_ok=True)

    def _shrink(self) -> None:
        """Remove the longest unused files, also those of processes that died, until the others are within the limit."""
        files = []
        with os.scandir(self._folder) as listing:
            for entry in listing:
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._limit:
                break
            if size:  # the locks are empty
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            total -= size
