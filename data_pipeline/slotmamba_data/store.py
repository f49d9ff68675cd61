"""Where a folder of shards is: on a local disk, or behind http and other stores (`slotmamba_data.remote`)."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slotmamba_data.errors import CorruptShardError, InputError
from slotmamba_data.files import naming
from slotmamba_data.manifest import MANIFEST_NAME, Manifest, ShardEntry

if TYPE_CHECKING:
    from slotmamba_data.remote import RemoteSettings

_BUILD = "build the folder again with `slotmamba data build`"


class ShardFile(Protocol):
    """An open shard."""

    def read(self, first: int, past: int) -> bytes:
        """Bytes `first` to `past - 1`, fewer only where the file ends before."""
        ...

    def read_again(self, first: int, past: int) -> bytes | None:
        """The same from where it comes from, when what was read is a copy; None when it was the original."""
        ...

    def mapped(self, first: int, past: int) -> memoryview | None:
        """The same in memory that is mapped to the file, for bytes that were read before; None where that cannot be, or
        the file was written to since."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """The files of a folder of shards."""

    def where(self, name: str) -> str:
        """The path or URL of a file."""
        ...

    def manifest(self) -> bytes:
        """The content of the manifest.

        Raises:
            InputError: there is none; says how one is made.
        """
        ...

    def check(self, entries: Sequence[ShardEntry], truncated: bool) -> None:
        """Looks, where that is cheap, whether all files are there and, unless they may be `truncated`, have their size.

        Raises:
            InputError: one is missing or was truncated.
        """
        ...

    def index(self, entry: ShardEntry) -> bytes:
        """The content of an index."""
        ...

    def open(self, entry: ShardEntry) -> ShardFile:
        """Opens a shard."""
        ...

    def expect(self, entries: Sequence[ShardEntry]) -> None:
        """Takes the hint that these shards are read soon, all of them."""
        ...

    def close(self) -> None: ...


def is_url(location: str | Path) -> bool:
    """Whether the location is a URL rather than a path."""
    return "://" in str(location)


def open_store(location: str | Path, remote: RemoteSettings | None = None) -> Store:
    """The store of a folder of shards at a path or URL; `remote` says how a URL is read."""
    if not is_url(location):
        return LocalStore(Path(location))
    from slotmamba_data.remote import RemoteSettings, RemoteStore

    return RemoteStore(str(location), remote or RemoteSettings())


def read_manifest(location: str | Path, remote: RemoteSettings | None = None) -> Manifest:
    """The manifest of a complete folder of shards at a path or URL.

    Raises:
        InputError: there is no such folder, or it is not complete.
        OSError: it cannot be read.
    """
    store = open_store(location, remote)
    try:
        return Manifest.parse(store.manifest(), store.where(MANIFEST_NAME))
    finally:
        store.close()


class LocalStore:
    """Files of a local or mounted file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def manifest(self) -> bytes:
        folder, path = self._folder, self._folder / MANIFEST_NAME
        if not path.is_file():
            reason = "is a file, not a folder of shards" if folder.exists() else "does not exist"
            if folder.is_dir():
                reason = "holds no manifest.json, so it is not a complete folder of shards"
            inner = [name for name in ("train", "val") if (folder / name / MANIFEST_NAME).is_file()]
            hint = f"; did you mean {folder / inner[0]}?" if inner else ": build it with `slotmamba data build`"
            raise InputError(f"{folder} {reason}{hint}")
        with naming(path):
            return path.read_bytes()

    def check(self, entries: Sequence[ShardEntry], truncated: bool) -> None:
        with naming(self._folder), os.scandir(self._folder) as listing:
            files = {file.name: file for file in listing if file.is_file()}
        for entry in entries:
            for what, name in (("shard", entry.name), ("index", entry.index)):
                if name not in files:
                    raise InputError(f"{what} {self.where(name)} is missing: {_BUILD}")
            size = files[entry.name].stat().st_size
            if size != entry.bytes and not truncated:
                raise InputError(_other_size(self.where(entry.name), size, entry.bytes))

    def index(self, entry: ShardEntry) -> bytes:
        path = self._folder / entry.index
        try:
            with naming(path):
                return path.read_bytes()
        except FileNotFoundError as error:
            raise CorruptShardError(f"index {path} is missing: {_BUILD}") from error

    def open(self, entry: ShardEntry) -> LocalFile:
        return LocalFile(self._folder / entry.name, entry.bytes)

    def expect(self, entries: Sequence[ShardEntry]) -> None:
        """The page cache needs no hint."""

    def close(self) -> None:
        """Nothing is kept open."""


def _other_size(path: str, size: int, written: int) -> str:
    return f"shard {path} has {size} bytes instead of {written}: it was truncated or replaced; {_BUILD}"


class LocalFile:
    """An open file. What is read for the first time is read, so that a failing disk is an error with a name in it; in
    mapped memory it would end the process with SIGBUS. From then on it is in memory, most likely, and mapped."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        with naming(path):
            self._file = io.FileIO(path)
        self._descriptor = self._file.fileno()
        status = os.fstat(self._descriptor)
        self._found, self._changed = status.st_size, status.st_mtime_ns
        self._map: mmap.mmap | None = None
        self._view = memoryview(b"")

    def read(self, first: int, past: int) -> bytes:
        if self._found != self._size:
            raise CorruptShardError(_other_size(str(self._path), self._found, self._size))
        try:
            return os.pread(self._descriptor, past - first, first)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def read_again(self, first: int, past: int) -> bytes | None:
        return None

    def mapped(self, first: int, past: int) -> memoryview | None:
        status = os.fstat(self._descriptor)
        if status.st_mtime_ns != self._changed or status.st_size < self._size:
            return None  # it was written to, so it has to be checked; past a new end it could not even be touched
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, self._size, prot=mmap.PROT_READ)
            self._view = memoryview(self._map)
        return self._view[first:past]

    def close(self) -> None:
        """Close the file. It stays mapped as long as arrays are in the mapped memory."""
        self._map, self._view = None, memoryview(b"")
        self._file.close()
