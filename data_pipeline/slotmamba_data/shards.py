"""Write tokenised documents as webdataset shards that can be read at random.

A folder of shards holds

    shard-000000.tar         webdataset samples; a sample holds consecutive documents, see below
    shard-000000.index.npz   where everything lies in the tar, and the CRC-32 of every 16 KiB of the tar
    manifest.json            kind, vocabulary, tokenizer digest, counts by source, and size and SHA-256 of every shard
                             and index

The manifest is written last: a folder without one is not complete, whatever else is in it. Tars are ordinary webdataset
shards, with fixed times and owners: the same documents give the same bytes.

A sample KEY holds the documents that follow until there are 65,536 tokens or 4096 documents, so that tiny documents do
not cost a tar header each and a run of documents is one stretch of bytes:

    KEY.tokens.npy           uint16 or uint32, the tokens of its documents, one after the other
    KEY.ends.npy             int64 [documents], where each document ends in them
    KEY.labels.npy           int32, recall data only: a label for each token
    KEY.encoder.npy          like the tokens, seq2seq form only, with KEY.encoder_ends.npy
    KEY.json                 {"documents": how many, "tokens": how many, "all": {...}, "each": {...}}: what is known of
                             the documents; a value that all of them share stands in `all`, else `each` has a list

The index holds `counts` (int64 [documents], tokens), `encoder_counts` in the seq2seq form, and for each sample
`documents` (how many), `tokens_offset`, `labels_offset`, `encoder_offset` (the bytes at which the numbers begin) and
`meta_offset` and `meta_bytes` (the JSON), all int64. `block_crc32` is uint32, one per 16 KiB block.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from slotmamba_data.blocks import digest_file
from slotmamba_data.errors import InputError
from slotmamba_data.files import naming, publish, sha256_hex, sync_folder, temporary, write_file
from slotmamba_data.manifest import FORMAT, MANIFEST_NAME, Manifest, ShardEntry, SourceCount, add_counts

SHARD_BYTES = 256 * 1024 * 1024
SHARD_DOCUMENTS = 2**19  # which bounds the memory that an index takes
SAMPLE_TOKENS = 2**16
SAMPLE_DOCUMENTS = 4096
_OWN_FILES = re.compile(r"(shard-\d{6,}(-\d{4,})?\.(tar|index\.npz)|manifest\.json)(\.tmp)?")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of stored tokens: 2 bytes up to 65,536 of them, else 4."""
    if not 1 <= vocab_size <= 2**31:
        raise InputError(f"vocab_size={vocab_size}: expected at least 1, and at most 2^31 tokens")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Shard:
    """A tar being written under a temporary name, and what its index will say.

    Attributes:
        documents: added so far.
        sources: of these and their tokens, by source (`source` in what is known of a document).
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.documents = 0
        self.sources: dict[str, SourceCount] = {}
        self._key = key
        self._written = 0
        self._tokens = 0
        self._waiting = 0  # bytes and tokens of the documents that are not written yet
        self._waiting_tokens = 0
        self._arrays: dict[str, list[np.ndarray]] = {}
        self._meta: list[Mapping[str, Any]] = []
        self._counts: dict[str, list[int]] = {"counts": []}
        self._samples: dict[str, list[int]] = {
            name: [] for name in ("documents", "tokens_offset", "meta_offset", "meta_bytes")
        }
        with naming(path):
            self._file: BinaryIO = open(temporary(path), "wb")  # noqa: SIM115 (closed by finish or discard)

    @property
    def full(self) -> bool:
        """Whether it holds as many documents as a shard may."""
        return self.documents >= SHARD_DOCUMENTS

    @property
    def size(self) -> int:
        """Bytes of the tar so far, without the headers of the sample that is being collected."""
        return self._written + self._waiting

    def add(self, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Append a document: `tokens` and, by kind and form, `labels` and `encoder` in the types that are stored."""
        for name, array in arrays.items():
            self._arrays.setdefault(name, []).append(array)
            self._waiting += array.nbytes
        self._meta.append(meta)
        count = len(arrays["tokens"])
        self._counts["counts"].append(count)
        if "encoder" in arrays:
            self._counts.setdefault("encoder_counts", []).append(len(arrays["encoder"]))
        if "source" in meta:
            add_counts(self.sources, {meta["source"]: SourceCount(1, count)})
        self.documents += 1
        self._waiting_tokens += count
        if self._waiting_tokens >= SAMPLE_TOKENS or len(self._meta) >= SAMPLE_DOCUMENTS:
            self._write_sample()

    def _write_sample(self) -> None:
        key = f"{self._key}-{len(self._samples['documents']):06d}"
        for name, arrays in self._arrays.items():
            end = self._write_array(f"{key}.{name}.npy", joined := np.concatenate(arrays))
            self._samples.setdefault(f"{name}_offset", []).append(end - joined.nbytes)
            if name != "labels":
                ends = np.cumsum([len(array) for array in arrays], dtype="<i8")
                self._write_array(f"{key}.{'ends' if name == 'tokens' else f'{name}_ends'}.npy", ends)
        meta = {"documents": len(self._meta), "tokens": self._waiting_tokens, **_columns(self._meta)}
        content = json.dumps(meta, separators=(",", ":")).encode()
        self._samples["meta_offset"].append(self._write(f"{key}.json", content) - len(content))
        self._samples["meta_bytes"].append(len(content))
        self._samples["documents"].append(len(self._meta))
        self._tokens += self._waiting_tokens
        self._arrays, self._meta, self._waiting, self._waiting_tokens = {}, [], 0, 0

    def _write_array(self, name: str, array: np.ndarray) -> int:
        content = io.BytesIO()
        np.save(content, array)
        return self._write(name, content.getvalue())

    def _write(self, name: str, content: bytes) -> int:
        """Append a member; returns the byte of the tar at which its content ends."""
        member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner's name empty
        member.size = len(content)
        header = member.tobuf(tarfile.USTAR_FORMAT)
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        with naming(self.path):
            self._file.write(header + content + padding)
        end = self._written + len(header) + len(content)
        self._written = end + len(padding)
        return end

    def finish(self) -> ShardEntry:
        """End the tar, write the index, and give both their names."""
        if self._meta:
            self._write_sample()
        with naming(self.path):
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        digest, crcs = digest_file(temporary(self.path))
        size = temporary(self.path).stat().st_size
        with naming(self.path):
            publish(self.path)
        columns = {**self._counts, **self._samples}
        index = io.BytesIO()
        arrays = {name: np.asarray(column, dtype=np.int64) for name, column in columns.items()}
        np.savez(index, allow_pickle=False, block_crc32=crcs, **arrays)
        index_path = self.path.with_suffix(".index.npz")
        write_file(index_path, index.getvalue())
        return ShardEntry(
            name=self.path.name,
            bytes=size,
            sha256=digest,
            index=index_path.name,
            index_sha256=sha256_hex(index.getvalue()),
            documents=self.documents,
            tokens=self._tokens,
        )

    def discard(self) -> None:
        """Give up: close and remove the temporary file."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
            self._file.close()
        temporary(self.path).unlink(missing_ok=True)


def _columns(meta: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is known of documents, by name: what all of them share, and lists of the rest."""
    shared: dict[str, Any] = {}
    each: dict[str, Any] = {}
    for name in sorted({name for one in meta for name in one}):
        values = [one.get(name) for one in meta]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        else:
            each[name] = values
    return {"all": shared, "each": each}


class ShardWriter:
    """Writes documents into a folder of shards; the folder is complete once `close` has returned.

    Used as a context manager it closes at the end of the block, and on an exception removes what it wrote.

    Args:
        folder: made when missing. Left-overs of a writer that was killed are replaced.
        vocab_size: every token must be below; tokens take 2 bytes up to 65,536 and 4 bytes above.
        kind: `lm` or `mqar`; samples of `mqar` carry labels.
        form: `seq2seq` when samples carry encoder tokens.
        tokenizer: digest of the tokenizer, for text.
        shard_bytes: a shard is closed once it is so large, or holds 2^19 documents.
        about: how the documents were made, JSON values, for the manifest.
        overwrite: replace a complete folder.

    Raises:
        InputError: the folder is complete already and not to be replaced, or the arguments make no sense.
        OSError: it cannot be written; every OSError of the methods names the file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        kind: Literal["lm", "mqar"] = "lm",
        form: Literal["decoder", "seq2seq"] = "decoder",
        tokenizer: str | None = None,
        shard_bytes: int = SHARD_BYTES,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if shard_bytes < 1:
            raise InputError(f"shard_bytes={shard_bytes}: expected at least 1")
        if form == "seq2seq" and kind != "mqar":
            raise InputError(f"shards of kind {kind} have no seq2seq form")
        self._target = self.folder = Path(folder)
        self.kind, self.form, self.vocab_size, self.tokenizer = kind, form, vocab_size, tokenizer
        self.documents = 0
        self.tokens = 0
        self._about = dict(about or {})
        self._shard_bytes = shard_bytes
        self._dtype = token_dtype(vocab_size)
        self._entries: list[ShardEntry] = []
        self._sources: dict[str, SourceCount] = {}
        self._shard: Shard | None = None
        self._manifest: Manifest | None = None
        if (self.folder / MANIFEST_NAME).exists() and not overwrite:
            raise InputError(f"{self.folder} is a complete folder of shards: choose another output, or overwrite it")
        if (self.folder / MANIFEST_NAME).exists():
            # What is there stays until there is something to put in its place.
            self.folder = self._target.with_name(f".{self._target.name}.new")
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            clear(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def add(
        self,
        tokens: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        encoder: np.ndarray | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one document.

        Args:
            tokens: int [tokens], beginning and end included; none is a document too.
            labels: int [tokens] for kind `mqar`: what is to be predicted at each token, -100 for nothing.
            encoder: int [encoder tokens] for the seq2seq form.
            meta: JSON values to keep with the document; the manifest counts by the string `source`.

        Raises:
            InputError: the arrays do not suit the kind, or a token is outside the vocabulary.
        """
        arrays = self._arrays(tokens, labels, encoder)
        if self._shard is None:
            name = f"{len(self._entries):06d}"
            self._shard = Shard(self.folder / f"shard-{name}.tar", name)
        self._shard.add(arrays, meta or {})
        self.documents += 1
        self.tokens += len(tokens)
        if self._shard.full or self._shard.size >= self._shard_bytes:
            self._finish_shard()

    def _arrays(
        self, tokens: np.ndarray, labels: np.ndarray | None, encoder: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        if (labels is None) == (self.kind == "mqar") or (encoder is None) == (self.form == "seq2seq"):
            raise InputError(
                f"a document of kind {self.kind}, form {self.form}: wrong set of labels and encoder tokens"
            )
        if labels is not None and labels.shape != tokens.shape:
            raise InputError(f"labels of shape {labels.shape} for tokens of shape {tokens.shape}")
        arrays = {"tokens": checked_tokens(tokens, self.vocab_size)}
        if labels is not None:
            arrays["labels"] = labels.astype("<i4")
        if encoder is not None:
            arrays["encoder"] = checked_tokens(encoder, self.vocab_size)
        return arrays

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._entries.append(self._shard.finish())
        add_counts(self._sources, self._shard.sources)
        self._shard = None

    def close(self) -> Manifest:
        """Finish the last shard and declare the folder complete; on failure everything written is removed.

        Raises:
            InputError: no document was added.
        """
        if self._manifest is None:
            try:
                self._manifest = self._finish()
            except BaseException:
                self.abort()
                raise
        return self._manifest

    def _finish(self) -> Manifest:
        if not self.documents:
            raise InputError(f"no documents to write to {self.folder}")
        if self._shard is not None:
            self._finish_shard()
        manifest = Manifest(
            format=FORMAT,
            kind=self.kind,
            form=self.form,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            token_dtype=self._dtype.name,
            documents=self.documents,
            tokens=self.tokens,
            shards=tuple(self._entries),
            sources=self._sources,
            about=self._about,
        )
        manifest.write(self.folder)
        if self.folder != self._target:
            _move(self.folder, self._target)
            self.folder = self._target
        return manifest

    def abort(self) -> None:
        """Remove everything written so far."""
        if self._shard is not None:
            self._shard.discard()
            self._shard = None
        clear(self.folder)
        if self.folder != self._target:
            self.folder.rmdir()


def checked_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Tokens in the type in which they are stored.

    Raises:
        InputError: they are not one-dimensional, or outside the vocabulary.
    """
    if tokens.ndim != 1:
        raise InputError(f"a document's tokens have shape {tokens.shape}, expected one dimension")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise InputError(f"tokens {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocab_size}")
    return tokens.astype(token_dtype(vocab_size))


def _move(source: Path, target: Path) -> None:
    """Replace the shards in `target` by those in `source`, the manifest last, and remove `source`."""
    with naming(target):
        clear(target)
        for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
            if path.name == MANIFEST_NAME:
                sync_folder(target)
            path.rename(target / path.name)
        sync_folder(target)
        source.rmdir()


def clear(folder: Path) -> None:
    """Remove the files of an earlier or broken build, the manifest first: without it nothing reads as complete."""
    if (folder / MANIFEST_NAME).exists():
        (folder / MANIFEST_NAME).unlink()
        sync_folder(folder)
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()
