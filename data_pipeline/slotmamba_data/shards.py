"""Write tokenised documents as webdataset shards that can be read at random.

A folder of shards holds

    shard-000000.tar         one sample a document: KEY.tokens.npy, KEY.json, and KEY.labels.npy for recall data,
                             KEY.encoder.npy for its seq2seq form
    shard-000000.index.npz   where each of these arrays lies in the tar, and the CRC-32 of every 16 KiB of the tar
    manifest.json            kind, vocabulary, tokenizer digest, totals, and size and SHA-256 of every shard and index

The manifest is written last: a folder without one is not complete, whatever else is in it. Tars are ordinary webdataset
shards, with fixed times and owners: the same documents give the same bytes.

An index holds int64 arrays `tokens_offset` and `tokens_count` (and `labels_offset`, `encoder_offset`, `encoder_count`
where there are such arrays; labels are as many as tokens): the byte at which document i's numbers begin in the tar and
how many there are. `block_crc32` is uint32, one per block.
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
from slotmamba_data.manifest import FORMAT, MANIFEST_NAME, Manifest, ShardEntry

SHARD_BYTES = 256 * 1024 * 1024
_OWN_FILES = re.compile(r"(shard-\d{6,}\.(tar|index\.npz)|manifest\.json)(\.tmp)?")


class ShardWriter:
    """Writes documents into a folder of shards; the folder is complete once `close` has returned.

    Used as a context manager it closes at the end of the block, and on an exception removes what it wrote.

    Args:
        folder: made when missing. Left-overs of a build that was killed are replaced.
        vocab_size: every token must be below; tokens take 2 bytes up to 65,536 and 4 bytes above.
        kind: `lm` or `mqar`; samples of `mqar` carry labels.
        form: `seq2seq` when samples carry encoder tokens.
        tokenizer: digest of the tokenizer, for text.
        shard_bytes: a shard is closed once it is so large.
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
        if not 1 <= vocab_size <= 2**31 or shard_bytes < 1:
            raise InputError(
                f"vocab_size={vocab_size}, shard_bytes={shard_bytes}: expected at least 1, and at most 2^31 tokens"
            )
        if form == "seq2seq" and kind != "mqar":
            raise InputError(f"shards of kind {kind} have no seq2seq form")
        self._target = self.folder = Path(folder)
        self.kind, self.form, self.vocab_size, self.tokenizer = kind, form, vocab_size, tokenizer
        self.documents = 0
        self.tokens = 0
        self._about = dict(about or {})
        self._shard_bytes = shard_bytes
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._entries: list[ShardEntry] = []
        self._shard: _OpenShard | None = None
        self._manifest: Manifest | None = None
        if (self.folder / MANIFEST_NAME).exists() and not overwrite:
            raise InputError(f"{self.folder} is a complete folder of shards: choose another output, or overwrite it")
        if (self.folder / MANIFEST_NAME).exists():
            # What is there stays until there is something to put in its place.
            self.folder = self._target.with_name(f".{self._target.name}.new")
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _clear(self.folder)

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
            tokens: int [tokens], at least one, beginning and end included.
            labels: int [tokens] for kind `mqar`: what is to be predicted at each token, -100 for nothing.
            encoder: int [encoder tokens] for the seq2seq form.
            meta: JSON values to keep beside the document.

        Raises:
            InputError: the arrays do not suit the kind, or a token is outside the vocabulary.
        """
        if (labels is None) == (self.kind == "mqar") or (encoder is None) == (self.form == "seq2seq"):
            raise InputError(
                f"a document of kind {self.kind}, form {self.form}: wrong set of labels and encoder tokens"
            )
        if labels is not None and labels.shape != tokens.shape:
            raise InputError(f"labels of shape {labels.shape} for tokens of shape {tokens.shape}")
        arrays = {"tokens": self._checked(tokens)}
        if labels is not None:
            arrays["labels"] = labels.astype("<i4")
        if encoder is not None:
            arrays["encoder"] = self._checked(encoder)
        if self._shard is None:
            self._shard = _OpenShard(self.folder / f"shard-{len(self._entries):06d}.tar")
        self._shard.add(f"{self.documents:09d}", arrays, {"tokens": len(tokens), **(meta or {})})
        self.documents += 1
        self.tokens += len(tokens)
        if self._shard.size >= self._shard_bytes:
            self._finish_shard()

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.ndim != 1 or not tokens.size:
            raise InputError(
                f"a document's tokens have shape {tokens.shape}, expected one dimension and at least one token"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise InputError(f"tokens {tokens.min()} to {tokens.max()} do not fit a vocabulary of {self.vocab_size}")
        return tokens.astype(self._dtype)

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._entries.append(self._shard.finish())
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
        _clear(self.folder)
        if self.folder != self._target:
            self.folder.rmdir()


def _move(source: Path, target: Path) -> None:
    """Replace the shards in `target` by those in `source`, the manifest last, and remove `source`."""
    with naming(target):
        _clear(target)
        for path in sorted(source.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
            if path.name == MANIFEST_NAME:
                sync_folder(target)
            path.rename(target / path.name)
        sync_folder(target)
        source.rmdir()


def _clear(folder: Path) -> None:
    """Remove the files of an earlier or broken build, the manifest first: without it nothing reads as complete."""
    if (folder / MANIFEST_NAME).exists():
        (folder / MANIFEST_NAME).unlink()
        sync_folder(folder)
    for path in folder.iterdir():
        if _OWN_FILES.fullmatch(path.name):
            path.unlink()


class _OpenShard:
    """A tar being written under a temporary name, and what its index will say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._tokens = 0
        self._columns: dict[str, list[int]] = {"tokens_offset": [], "tokens_count": []}
        with naming(path):
            self._file: BinaryIO = open(temporary(path), "wb")  # noqa: SIM115 (closed by finish or discard)

    def add(self, key: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            end = self._write(f"{key}.{name}.npy", content.getvalue())
            self._columns.setdefault(f"{name}_offset", []).append(end - array.nbytes)
            if name != "labels":
                self._columns.setdefault(f"{name}_count", []).append(len(array))
        self._write(f"{key}.json", json.dumps(dict(meta)).encode())
        self._tokens += len(arrays["tokens"])

    def _write(self, name: str, content: bytes) -> int:
        """Append a member; returns the byte of the tar at which its content ends."""
        member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner's name empty
        member.size = len(content)
        header = member.tobuf(tarfile.USTAR_FORMAT)
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        with naming(self.path):
            self._file.write(header + content + padding)
        end = self.size + len(header) + len(content)
        self.size = end + len(padding)
        return end

    def finish(self) -> ShardEntry:
        """End the tar, write the index, and give both their names."""
        with naming(self.path):
            self._file.write(bytes(2 * tarfile.BLOCKSIZE))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        digest, crcs = digest_file(temporary(self.path))
        size = temporary(self.path).stat().st_size
        with naming(self.path):
            publish(self.path)
        columns = {name: np.asarray(column, dtype=np.int64) for name, column in self._columns.items()}
        index = io.BytesIO()
        np.savez(index, allow_pickle=False, block_crc32=crcs, **columns)
        index_path = self.path.with_suffix(".index.npz")
        write_file(index_path, index.getvalue())
        return ShardEntry(
            name=self.path.name,
            bytes=size,
            sha256=digest,
            index=index_path.name,
            index_sha256=sha256_hex(index.getvalue()),
            documents=len(self._columns["tokens_offset"]),
            tokens=self._tokens,
        )

    def discard(self) -> None:
        """Give up: close and remove the temporary file."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
            self._file.close()
        temporary(self.path).unlink(missing_ok=True)
