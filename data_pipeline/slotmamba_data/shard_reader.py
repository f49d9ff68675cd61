"""Read documents of a folder of shards at random, checked against the folder's index as they are read."""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from slotmamba_data.blocks import BLOCK_BYTES, digest_file
from slotmamba_data.errors import CorruptShardError, InputError
from slotmamba_data.files import naming, sha256_hex
from slotmamba_data.manifest import Manifest, ShardEntry

_OPEN_FILES = 64
_INDEXES = 64  # that are kept in memory

Array = Literal["tokens", "labels", "encoder"]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The documents of one shard, numbered from 0 within it.

    Attributes:
        counts: int64 [documents], tokens of each document; as many labels in recall data.
        ends: int64 [documents], where each document ends in the stream of the shard's tokens.
        encoder_counts, encoder_ends: the same of the encoder tokens; None without an encoder.
    """

    counts: np.ndarray
    ends: np.ndarray
    encoder_counts: np.ndarray | None
    encoder_ends: np.ndarray | None


class ShardFolder:
    """The documents of a complete folder, by shard.

    Opening reads the manifest and checks the sizes of the shards, no index: those are opened when needed and a bounded
    number of them is kept. Reading checks the CRC-32 of each 16 KiB block that it touches. `verify` checks every byte.

    Attributes:
        path: the folder.
        manifest: its manifest.

    Raises:
        InputError: no complete folder, or a shard or index is missing, or a shard truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._shards = [_Shard(self.path, entry) for entry in self.manifest.shards]
        self._first = np.cumsum([0] + [shard.entry.documents for shard in self._shards])
        self._dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._files: OrderedDict[Path, io.FileIO] = OrderedDict()
        self._columns = functools.lru_cache(maxsize=_INDEXES)(lambda shard: self._shards[shard].read_index())
        self.index = functools.lru_cache(maxsize=_INDEXES)(self._index)

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard, in memory only as long as it is used.

        Raises:
            CorruptShardError: it is not the one that was written.
            OSError: it cannot be read.
        """
        columns = self._columns(shard)
        counts, encoder = columns["tokens_count"], columns.get("encoder_count")
        return ShardIndex(counts, np.cumsum(counts), encoder, None if encoder is None else np.cumsum(encoder))

    def read(
        self, shard: int, document: int, start: int = 0, stop: int | None = None, array: Array = "tokens"
    ) -> np.ndarray:
        """Numbers `start` to `stop - 1` of a document's array: uint16 or uint32, labels int32. It may be read-only.

        Raises:
            CorruptShardError: the shard is damaged there; names shard and byte.
            OSError: it cannot be read.
        """
        index = self.index(shard)
        counts = index.encoder_counts if array == "encoder" else index.counts
        assert counts is not None
        stop = int(counts[document]) if stop is None else stop
        return self._read(shard, document, array, start, stop)

    def read_span(self, shard: int, start: int, stop: int, array: Array = "tokens") -> np.ndarray:
        """Numbers `start` to `stop - 1` of the stream that an array of all documents of a shard makes, in their order.

        Document d is that from `ends[d] - counts[d]` to `ends[d] - 1` of the shard's index (of its encoder's for
        `encoder`). Types and errors as for `read`.
        """
        index = self.index(shard)
        ends = index.encoder_ends if array == "encoder" else index.ends
        assert ends is not None and 0 <= start <= stop <= ends[-1]
        parts = [np.empty(0, np.dtype("<i4") if array == "labels" else self._dtype)]
        document = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = int(ends[document - 1]) if document else 0
            past = min(stop, int(ends[document]))
            parts.append(self._read(shard, document, array, start - begin, past - begin))
            start, document = past, document + 1
        return np.concatenate(parts)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int64 [documents], tokens of each document of all shards."""
        return np.concatenate([self.index(shard).counts for shard in range(len(self._shards))])

    @functools.cached_property
    def encoder_counts(self) -> np.ndarray | None:
        """int64 [documents], encoder tokens of each document of all shards; None without an encoder."""
        if self.manifest.form != "seq2seq":
            return None
        return np.concatenate([self._columns(shard)["encoder_count"] for shard in range(len(self._shards))])

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """`read` of tokens, the document numbered over all shards."""
        return self.read(*self._locate(document), start, stop)

    def labels(self, document: int) -> np.ndarray:
        """`read` of labels, the document numbered over all shards."""
        return self.read(*self._locate(document), array="labels")

    def encoder_tokens(self, document: int) -> np.ndarray:
        """`read` of encoder tokens, the document numbered over all shards."""
        return self.read(*self._locate(document), array="encoder")

    def _locate(self, document: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return shard, document - int(self._first[shard])

    def _read(self, shard: int, document: int, array: Array, start: int, stop: int) -> np.ndarray:
        dtype = np.dtype("<i4") if array == "labels" else self._dtype
        columns = self._columns(shard)
        begin = int(columns[f"{array}_offset"][document])
        first, past = begin + start * dtype.itemsize, begin + stop * dtype.itemsize
        file = self._open(self._shards[shard].path)
        what = f"document {int(self._first[shard]) + document}"
        return np.frombuffer(self._shards[shard].read(file, first, past, columns["block_crc32"], what), dtype=dtype)

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
        for number, shard in enumerate(self._shards):
            shard.verify(self._columns(number)["block_crc32"])

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
        index = folder / entry.index
        if not index.is_file():
            raise InputError(f"index {index} is missing: build the folder again with `slotmamba data build`")
        if (size := self.path.stat().st_size) != entry.bytes:
            raise InputError(
                f"shard {self.path} has {size} bytes instead of {entry.bytes}: it was truncated or replaced; "
                "build the folder again with `slotmamba data build`"
            )

    def read_index(self) -> Mapping[str, np.ndarray]:
        path = self.path.with_name(self.entry.index)
        with naming(path):
            content = path.read_bytes()
        if sha256_hex(content) != self.entry.index_sha256:
            raise CorruptShardError(f"index {path} is not the one that was written: build the folder again")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def read(self, file: io.FileIO, first: int, past: int, crcs: np.ndarray, what: str) -> bytes:
        """Bytes `first` to `past - 1`, after a check of the blocks that hold them."""
        block = first // BLOCK_BYTES
        begin = block * BLOCK_BYTES
        end = min(-(-past // BLOCK_BYTES) * BLOCK_BYTES, self.entry.bytes)
        with naming(self.path):
            content = os.pread(file.fileno(), end - begin, begin)
        if len(content) < end - begin:
            raise CorruptShardError(
                f"shard {self.path} ends at byte {begin + len(content)}: it was truncated since it was opened"
            )
        for start in range(0, len(content), BLOCK_BYTES):
            if zlib.crc32(content[start : start + BLOCK_BYTES]) != crcs[block + start // BLOCK_BYTES]:
                raise CorruptShardError(self._damage(begin + start, f", read for {what} at byte {first}"))
        return content[first - begin : past - begin]

    def verify(self, written: np.ndarray) -> None:
        """Compare every byte with what was written."""
        digest, crcs = digest_file(self.path)
        damaged = np.flatnonzero(crcs != written)
        if damaged.size:
            raise CorruptShardError(self._damage(int(damaged[0]) * BLOCK_BYTES, ""))
        if digest != self.entry.sha256:
            raise CorruptShardError(f"shard {self.path} has another SHA-256 than its manifest says")

    def _damage(self, byte: int, context: str) -> str:
        past = min(byte + BLOCK_BYTES, self.entry.bytes)
        return f"shard {self.path} is damaged between bytes {byte} and {past} (CRC-32){context}; build the folder again"
