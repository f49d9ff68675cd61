"""Read documents of a folder of shards at random, checked against the folder's index as they are read."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from slotmamba_data.blocks import BLOCK_BYTES, digest_file
from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, sha256_hex
from slotmamba_data.manifest import Manifest, ShardEntry

_OPEN_FILES = 64


class ShardFolder:
    """The documents of a complete folder, numbered from 0 over all shards.

    Opening checks the sizes of all shards and the digests of all indexes. Reading checks the CRC-32 of each 16 KiB
    block that it touches. `verify` checks every byte.

    Attributes:
        path: the folder.
        manifest: its manifest.
        counts: int64 [documents], tokens of each document.
        encoder_counts: int64 [documents], encoder tokens of each; None without an encoder.

    Raises:
        InputError: no complete folder, a shard is missing or truncated, or an index is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._shards = [_Shard(self.path, entry) for entry in self.manifest.shards]
        self._first = np.cumsum([0] + [shard.entry.documents for shard in self._shards])
        self._dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._files: OrderedDict[Path, io.FileIO] = OrderedDict()
        self.counts = self._joined("tokens_count")
        self.encoder_counts = self._joined("encoder_count") if self.manifest.form == "seq2seq" else None

    def _joined(self, column: str) -> np.ndarray:
        return np.concatenate([shard.columns[column] for shard in self._shards])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop - 1` of a document, uint16 or uint32.

        Raises:
            InputError: the shard is damaged there; names shard and byte.
            OSError: it cannot be read.
        """
        stop = int(self.counts[document]) if stop is None else stop
        return self._read(document, "tokens", self._dtype, start, stop)

    def labels(self, document: int) -> np.ndarray:
        """Labels of a recall sample, int32 [tokens]; errors as for `tokens`."""
        return self._read(document, "labels", np.dtype("<i4"), 0, int(self.counts[document]))

    def encoder_tokens(self, document: int) -> np.ndarray:
        """Encoder tokens of a seq2seq sample, uint16 or uint32; errors as for `tokens`."""
        assert self.encoder_counts is not None
        return self._read(document, "encoder", self._dtype, 0, int(self.encoder_counts[document]))

    def _read(self, document: int, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        number = int(np.searchsorted(self._first, document, side="right")) - 1
        shard = self._shards[number]
        begin = int(shard.columns[f"{name}_offset"][document - self._first[number]])
        first, past = begin + start * dtype.itemsize, begin + stop * dtype.itemsize
        content = shard.read(self._open(shard.path), first, past, f"document {document}")
        return np.frombuffer(content, dtype=dtype)

    def _open(self, path: Path) -> io.FileIO:
        """The shard's open file; the longest unused one is closed when there are too many."""
        if path in self._files:
            self._files.move_to_end(path)
        else:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            with naming(path):
                self._files[path] = io.FileIO(path)
        return self._files[path]

    def verify(self) -> None:
        """Read every shard and compare it with the manifest.

        Raises:
            InputError: a shard is not as it was written; names shard and byte.
        """
        for shard in self._shards:
            shard.verify()

    def close(self) -> None:
        """Close the files; they open again when needed."""
        while self._files:
            self._files.popitem()[1].close()


def verify(folder: str | Path) -> Manifest:
    """Check every byte of a folder of shards against its manifest, and return the manifest.

    Raises:
        InputError: something is missing, truncated or damaged; names the file and, in a shard, the byte.
    """
    shards = ShardFolder(folder)
    shards.verify()
    return shards.manifest


class _Shard:
    """One tar, described by its index."""

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        self.entry = entry
        self.path = folder / entry.name
        if not self.path.is_file():
            raise InputError(f"shard {self.path} is missing: build the folder again with `slotmamba data build`")
        if (size := self.path.stat().st_size) != entry.bytes:
            raise InputError(
                f"shard {self.path} has {size} bytes instead of {entry.bytes}: it was truncated or replaced; "
                "build the folder again with `slotmamba data build`"
            )
        self.columns = self._read_index(folder / entry.index)
        self._crcs = self.columns["block_crc32"]

    def _read_index(self, path: Path) -> Mapping[str, np.ndarray]:
        if not path.is_file():
            raise InputError(f"index {path} is missing: build the folder again with `slotmamba data build`")
        with naming(path):
            content = path.read_bytes()
        if sha256_hex(content) != self.entry.index_sha256:
            raise InputError(f"index {path} is not the one that was written: build the folder again")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def read(self, file: io.FileIO, first: int, past: int, what: str) -> bytes:
        """Bytes `first` to `past - 1`, after a check of the blocks that hold them."""
        block = first // BLOCK_BYTES
        begin = block * BLOCK_BYTES
        end = min(-(-past // BLOCK_BYTES) * BLOCK_BYTES, self.entry.bytes)
        with naming(self.path):
            content = os.pread(file.fileno(), end - begin, begin)
        if len(content) < end - begin:
            raise InputError(
                f"shard {self.path} ends at byte {begin + len(content)}: it was truncated since it was opened"
            )
        for start in range(0, len(content), BLOCK_BYTES):
            if zlib.crc32(content[start : start + BLOCK_BYTES]) != self._crcs[block + start // BLOCK_BYTES]:
                raise InputError(self._damage(begin + start, f", read for {what} at byte {first}"))
        return content[first - begin : past - begin]

    def verify(self) -> None:
        """Compare every byte with what was written."""
        digest, crcs = digest_file(self.path)
        damaged = np.flatnonzero(crcs != self._crcs)
        if damaged.size:
            raise InputError(self._damage(int(damaged[0]) * BLOCK_BYTES, ""))
        if digest != self.entry.sha256:
            raise InputError(f"shard {self.path} has another SHA-256 than its manifest says")

    def _damage(self, byte: int, context: str) -> str:
        past = min(byte + BLOCK_BYTES, self.entry.bytes)
        return f"shard {self.path} is damaged between bytes {byte} and {past} (CRC-32){context}; build the folder again"
