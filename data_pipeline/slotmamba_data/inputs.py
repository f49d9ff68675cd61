"""Divide the inputs of a build into pieces of work, in a way that depends on the inputs alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slotmamba_data.text import is_compressed, locate, parquet_groups

_COMPRESSION = 4  # a compressed file counts as so many times its size
_PIECES = 256  # at least so many, where there is enough text
_SMALLEST = 16 * 1024 * 1024


@dataclass(frozen=True)
class Part:
    """An input or, with `stop`, the bytes or row groups `start` to `stop - 1` of one; `work` is its size, roughly, in
    bytes of text."""

    spec: str
    work: int
    start: int = 0
    stop: int | None = None


def describe(spec: str) -> dict[str, str | int]:
    """What tells whether an input is still the one it was: name, size and time of change."""
    with locate(spec) as path:
        status = path.stat()
        embedded = spec != str(path)
        return {"input": spec, "bytes": status.st_size, "changed": 0 if embedded else status.st_mtime_ns}


def pieces(specs: Sequence[str], shard_bytes: int) -> list[tuple[Part, ...]]:
    """The pieces of the inputs, in their order: small inputs together, large ones in parts where they can be divided.

    A piece is one 256th of the inputs, but for small and very large ones: at least 16 MiB of text and at most what
    makes two shards or so.

    Raises:
        InputError: an input cannot be read.
    """
    largest = 4 * shard_bytes
    total = sum(part.work for spec in specs for part in _parts(spec, largest))
    target = min(max(total // _PIECES, _SMALLEST), largest)
    found: list[tuple[Part, ...]] = []
    open_piece: list[Part] = []
    for part in (part for spec in specs for part in _parts(spec, target)):
        if open_piece and sum(each.work for each in open_piece) + part.work > target:
            found.append(tuple(open_piece))
            open_piece = []
        open_piece.append(part)
    if open_piece:
        found.append(tuple(open_piece))
    return found


def _parts(spec: str, target: int) -> Iterator[Part]:
    with locate(spec) as path:
        if path.suffix == ".parquet":
            yield from _runs_of_groups(spec, path, target)
            return
        size = path.stat().st_size
        if is_compressed(path):
            yield Part(spec, size * _COMPRESSION)
        elif path.suffix == ".jsonl" and size > target:
            for start in range(0, size, target):
                yield Part(spec, min(target, size - start), start, min(start + target, size))
        else:
            yield Part(spec, size)


def _runs_of_groups(spec: str, path: Path, target: int) -> Iterator[Part]:
    start = work = 0
    sizes = parquet_groups(path)
    for group, size in enumerate(sizes):
        work += size
        if work >= target or group + 1 == len(sizes):
            yield Part(spec, work, start, group + 1)
            start, work = group + 1, 0
