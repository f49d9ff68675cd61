"""Exact de-duplication: of documents of the same text the first is kept, whatever the number of processes.

Each piece is read once and the hashes of its documents are written down, sorted. Then the hashes of all pieces are
compared range by range, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from slotmamba_data.files import naming, write_file

_AT_ONCE = 2**22  # hashes that are compared at once, about


def hash_texts(texts: Iterable[str | None]) -> np.ndarray:
    """The SHA-256 of each text, shortened to 128 bits, and its place among them: uint64 [3, texts], the rows being the
    high word, the low word and the place, sorted by them in this order. A place without text has no column."""
    digests = bytearray()
    places = []
    for place, text in enumerate(texts):
        if text is not None:
            digests += hashlib.sha256(text.encode()).digest()[:16]
            places.append(place)
    high, low = np.frombuffer(bytes(digests), dtype="<u8").reshape(-1, 2).T
    table = np.stack((high, low, np.asarray(places, dtype=np.uint64)))
    return table[:, np.lexsort(table[::-1])]


def hashes_file(work: Path, piece: int) -> Path:
    """Where the hashes of a piece are, as `hash_texts` returns them."""
    return work / f"hashes-{piece:06d}.npy"


def duplicates_file(work: Path, piece: int) -> Path:
    """Where the places of the duplicates of a piece are: uint64, sorted."""
    return work / f"duplicates-{piece:06d}.npy"


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array such that the file is absent or complete."""
    content = io.BytesIO()
    np.save(content, array)
    write_file(path, content.getvalue())


def find_duplicates(work: Path, pieces: int, on_range: Callable[[float], None]) -> None:
    """Compare the hashes of all pieces and write down the duplicates of each.

    Args:
        work: folder of the files.
        pieces: how many there are.
        on_range: called with the share of the work that was done since the last call.
    """
    tables = [_open(hashes_file(work, piece)) for piece in range(pieces)]
    ranges = max(1, -(-sum(table.shape[1] for table in tables) // _AT_ONCE))
    found: list[list[np.ndarray]] = [[] for _ in range(pieces)]
    for number in range(ranges):
        last = 2**64 * (number + 1) // ranges - 1
        for parts, places in zip(found, _in_range(tables, 2**64 * number // ranges, last), strict=True):
            parts.append(places)
        on_range(1 / ranges)
    for piece, parts in enumerate(found):
        write_array(duplicates_file(work, piece), np.sort(np.concatenate(parts)))


def _open(path: Path) -> np.ndarray:
    with naming(path):
        table: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return table


def _in_range(tables: Sequence[np.ndarray], first: int, last: int) -> list[np.ndarray]:
    """The places of the duplicates of each piece among the hashes whose high word is `first` to `last`."""
    parts = []
    for high, low, place in tables:
        some = slice(
            int(np.searchsorted(high, np.uint64(first))), int(np.searchsorted(high, np.uint64(last), side="right"))
        )
        parts.append(np.stack((high[some], low[some], place[some])))
    high, low, place = np.concatenate(parts, axis=1)
    piece = np.repeat(np.arange(len(parts)), [part.shape[1] for part in parts])
    order = np.lexsort((place, piece, low, high))
    same = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    again = order[1:][same]
    again = again[np.argsort(piece[again], kind="stable")]
    bounds = np.searchsorted(piece[again], np.arange(1, len(parts)))
    return np.split(place[again], bounds)
