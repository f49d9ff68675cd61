"""Read documents of a folder of shards at random, checked against the folder's index as they are read."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slotmamba_data.blocks import BLOCK_BYTES
from slotmamba_data.errors import CorruptShardError
from slotmamba_data.files import sha256_hex
from slotmamba_data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from slotmamba_data.store import Store, open_store

if TYPE_CHECKING:
    from slotmamba_data.remote import RemoteSettings

KEPT_OPEN = 40  # shards of which index and file are kept, which takes two descriptors each
_LABELS = np.dtype("<i4")

Array = Literal["tokens", "labels", "encoder"]


class ShardIndex:
    """The documents of one shard, numbered from 0 within it.

    Attributes:
        counts: int64 [documents], tokens of each document; as many labels in recall data.
        encoder_counts: int64 [documents], encoder tokens of each; None without an encoder.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.counts = columns["counts"]
        self.encoder_counts = columns.get("encoder_counts")
        self.columns = columns
        """All columns of the index as `slotmamba_data.shards` describes them."""
        self.sample_documents = np.cumsum(columns["documents"])
        """int64 [samples], where the documents of each sample end."""

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """int64 [documents], where each document ends in the stream of the shard's tokens."""
        return np.cumsum(self.counts)

    @functools.cached_property
    def encoder_ends(self) -> np.ndarray | None:
        """int64 [documents], the same of the encoder tokens; None without an encoder."""
        return None if self.encoder_counts is None else np.cumsum(self.encoder_counts)

    def begins(self, array: Array, itemsize: int) -> np.ndarray:
        """int64 [documents], the byte of the tar at which the numbers of each document begin."""
        counts = self.encoder_counts if array == "encoder" else self.counts
        assert counts is not None
        before = np.cumsum(counts) - counts
        first = self.sample_documents - self.columns["documents"]
        shift = self.columns[f"{array}_offset"] - before[first] * itemsize
        return np.repeat(shift, self.columns["documents"]) + before * itemsize


class ShardFolder:
    """The documents of a complete folder, by shard.

    Opening reads the manifest and, on a local disk, checks the sizes of the shards. Indexes and shards are opened when
    they are needed, and as many as `kept_open` of them stay open. Reading checks the CRC-32 of each 16 KiB block that
    it touches for the first time since its shard was opened. `verify` checks every byte.

    Args:
        location: path or URL (http, https, or what fsspec knows).
        remote: how a URL is read.
        kept_open: shards whose index (16 bytes a document) and file are kept open: those that are used by turns.
        truncated: open the folder even if a local shard has another size than was written. None of its documents can be
            read, as from a remote store.

    Attributes:
        location: path or URL.
        manifest: its manifest.
        first: int64 [shards + 1], the number over all shards of each shard's first document; last that of documents.

    Raises:
        InputError: no complete folder, or a shard or index is missing, or a shard truncated.
        OSError: it cannot be read.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        remote: RemoteSettings | None = None,
        kept_open: int = KEPT_OPEN,
        truncated: bool = False,
    ) -> None:
        self.location = str(location)
        self._store = open_store(location, remote)
        self.manifest = Manifest.parse(self._store.manifest(), self.where(MANIFEST_NAME))
        self._store.check(self.manifest.shards, truncated)
        self.first = np.cumsum([0] + [entry.documents for entry in self.manifest.shards])
        self._tokens_type = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._kept_open = kept_open
        self._shards: OrderedDict[int, _Shard] = OrderedDict()

    def where(self, name: str) -> str:
        """The path or URL of one of its files."""
        return self._store.where(name)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard. It should not be held longer than it is used.

        Raises:
            CorruptShardError: it is not the one that was written, or gone.
            OSError: it cannot be read.
        """
        return self._shard(shard).index

    def read(
        self, shard: int, document: int, start: int = 0, stop: int | None = None, array: Array = "tokens"
    ) -> np.ndarray:
        """Numbers `start` to `stop - 1` of a document's array: uint16 or uint32, labels int32; read-only.

        Raises:
            CorruptShardError: the shard is damaged there; names shard and byte.
            OSError: it cannot be read.
        """
        opened = self._shard(shard)
        if stop is None:
            counts = opened.index.encoder_counts if array == "encoder" else opened.index.counts
            assert counts is not None
            stop = int(counts[document])
        dtype = _LABELS if array == "labels" else self._tokens_type
        begin = int(opened.begins(array, dtype.itemsize)[document])
        content = opened.read(begin + start * dtype.itemsize, begin + stop * dtype.itemsize, document)
        return np.frombuffer(content, dtype=dtype)

    def read_span(self, shard: int, start: int, stop: int, array: Array = "tokens") -> np.ndarray:
        """Numbers `start` to `stop - 1` of the stream that an array of all documents of a shard makes, in their order.

        Document d is that from `ends[d] - counts[d]` to `ends[d] - 1` of the shard's index (of its encoder's for
        `encoder`). Within a sample, which has 65,536 tokens or more, it is one read however many documents it covers.
        Types and errors as for `read`.
        """
        opened = self._shard(shard)
        dtype = _LABELS if array == "labels" else self._tokens_type
        ends, begins = opened.samples(array, dtype.itemsize)
        parts = []
        sample = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            past = min(stop, int(ends[sample]))
            begin = int(begins[sample])
            document = int(opened.index.sample_documents[sample - 1]) if sample else 0
            content = opened.read(begin + start * dtype.itemsize, begin + past * dtype.itemsize, document)
            parts.append(np.frombuffer(content, dtype=dtype))
            start, sample = past, sample + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    def meta(self, shard: int, document: int) -> dict[str, Any]:
        """What was stored with a document beside its tokens, such as its `source`; errors as for `read`."""
        opened = self._shard(shard)
        index = opened.index
        sample = int(np.searchsorted(index.sample_documents, document, side="right"))
        first = int(index.columns["meta_offset"][sample])
        content = opened.read(first, first + int(index.columns["meta_bytes"][sample]), document)
        known = json.loads(bytes(content))
        place = document - int(index.sample_documents[sample] - index.columns["documents"][sample])
        return {**known["all"], **{name: values[place] for name, values in known["each"].items()}}

    def expect(self, shards: Sequence[int]) -> None:
        """Say that all of these shards are read soon, in any order: remote ones are fetched in the background."""
        self._store.expect([self.manifest.shards[shard] for shard in shards])

    def _shard(self, number: int) -> _Shard:
        """The open shard; the longest unused one is closed when there are too many."""
        shard = self._shards.get(number)
        if shard is None:
            if len(self._shards) >= self._kept_open:
                self._shards.popitem(last=False)[1].close()
            shard = _Shard(self._store, self.manifest.shards[number], int(self.first[number]))
            self._shards[number] = shard
        else:
            self._shards.move_to_end(number)
        return shard

    def verify(self) -> None:
        """Read every shard and compare it with the manifest.

        Raises:
            CorruptShardError: a shard is not as it was written; names shard and byte.
        """
        for number in range(len(self.manifest.shards)):
            self._shard(number).verify()

    def close(self) -> None:
        """Close the files; they open again when needed."""
        while self._shards:
            self._shards.popitem()[1].close()
        self._store.close()

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """`read` of tokens, the document numbered over all shards."""
        return self.read(*self.locate(document), start, stop)

    def labels(self, document: int) -> np.ndarray:
        """`read` of labels, the document numbered over all shards."""
        return self.read(*self.locate(document), array="labels")

    def encoder_tokens(self, document: int) -> np.ndarray:
        """`read` of encoder tokens, the document numbered over all shards."""
        return self.read(*self.locate(document), array="encoder")

    def locate(self, document: int) -> tuple[int, int]:
        """Its shard and its number in there, of a document numbered over all shards."""
        shard = int(np.searchsorted(self.first, document, side="right")) - 1
        return shard, document - int(self.first[shard])


def verify(folder: str | Path) -> Manifest:
    """Check every byte of a folder of shards against its manifest, and return the manifest.

    Raises:
        InputError: something is missing, truncated or damaged; names the file and, in a shard, the byte.
    """
    shards = ShardFolder(folder)
    shards.verify()
    shards.close()
    return shards.manifest


class _Shard:
    """One open tar, described by its index."""

    def __init__(self, store: Store, entry: ShardEntry, first_document: int) -> None:
        self._entry = entry
        self._first_document = first_document
        self._where = store.where(entry.name)
        content = store.index(entry)
        if sha256_hex(content) != entry.index_sha256:
            raise CorruptShardError(
                f"index {store.where(entry.index)} is not the one that was written: build the folder again"
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
        self._crcs = memoryview(columns.pop("block_crc32"))
        self._checked = bytearray(len(self._crcs))  # 1 for blocks that are what was written
        self.index = ShardIndex(columns)
        found = len(self.index.counts), int(self.index.counts.sum())
        if found != (entry.documents, entry.tokens):
            raise CorruptShardError(
                f"{store.where(MANIFEST_NAME)} says that {entry.name} has {entry.documents} documents of "
                f"{entry.tokens} tokens, its index has {found[0]} of {found[1]}: build the folder again"
            )
        self._begins: dict[Array, np.ndarray] = {}
        self._samples: dict[Array, tuple[np.ndarray, np.ndarray]] = {}
        self._file = store.open(entry)

    def begins(self, array: Array, itemsize: int) -> np.ndarray:
        """int64 [documents], the byte at which the numbers of each document begin."""
        found = self._begins.get(array)
        if found is None:
            found = self._begins[array] = self.index.begins(array, itemsize)
        return found

    def samples(self, array: Array, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [samples]: where each sample ends in the stream of an array, and the byte at which the stream would
        begin if all of it lay as that sample does."""
        if array not in self._samples:
            ends = self.index.encoder_ends if array == "encoder" else self.index.ends
            assert ends is not None
            past = ends[self.index.sample_documents - 1]
            begins = self.index.columns[f"{array}_offset"] - itemsize * np.concatenate(([0], past[:-1]))
            self._samples[array] = past, begins
        return self._samples[array]

    def read(self, first: int, past: int, document: int) -> memoryview | bytes:
        """Bytes `first` to `past - 1`, after a check of the blocks that hold them where that was not made before."""
        if first >= past:
            return b""
        block, past_block = first // BLOCK_BYTES, -(-past // BLOCK_BYTES)
        if self._checked.find(0, block, past_block) < 0:
            mapped = self._file.mapped(first, past)
            if mapped is not None:
                return mapped
        begin, end = block * BLOCK_BYTES, min(past_block * BLOCK_BYTES, self._entry.bytes)
        content = memoryview(self._file.read(begin, end))
        damaged = self._damaged(content, block, end - begin)
        if damaged is not None:
            again = self._file.read_again(begin, end)
            if again is not None:
                content = memoryview(again)
                damaged = self._damaged(content, block, end - begin)
        if damaged is not None:
            raise CorruptShardError(self._damage(begin + damaged, len(content) < end - begin, document, first))
        self._checked[block:past_block] = b"\1" * (past_block - block)
        return content[first - begin : past - begin]

    def _damaged(self, content: memoryview, block: int, expected: int) -> int | None:
        """The byte of the content from which on it is not what was written, if there is one."""
        if len(content) < expected:
            return len(content)
        for start in range(0, expected, BLOCK_BYTES):
            if zlib.crc32(content[start : start + BLOCK_BYTES]) != self._crcs[block]:
                return start
            block += 1
        return None

    def _damage(self, byte: int, ends: bool, document: int, first: int) -> str:
        what = f"read for document {self._first_document + document} at byte {first}"
        if ends:
            return f"shard {self._where} ends at byte {byte}: it was truncated; {what}"
        return f"shard {self._where} is damaged between {self._block(byte)}, {what}; build the folder again"

    def _block(self, byte: int) -> str:
        return f"bytes {byte} and {min(byte + BLOCK_BYTES, self._entry.bytes)} (CRC-32)"

    def verify(self) -> None:
        """Compare every byte with what was written."""
        digest = hashlib.sha256()
        for block, byte in enumerate(range(0, self._entry.bytes, BLOCK_BYTES)):
            content = self._file.read(byte, min(byte + BLOCK_BYTES, self._entry.bytes))
            digest.update(content)
            if zlib.crc32(content) != self._crcs[block]:
                raise CorruptShardError(
                    f"shard {self._where} is damaged between {self._block(byte)}; build the folder again"
                )
        if digest.hexdigest() != self._entry.sha256:
            raise CorruptShardError(f"shard {self._where} has another SHA-256 than its manifest says")

    def close(self) -> None:
        self._file.close()
