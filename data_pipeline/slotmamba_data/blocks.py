"""Digests of a shard: of all of it, and of each block, so that a part can be trusted without reading the rest."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np

from slotmamba_data.files import naming

BLOCK_BYTES = 16 * 1024  # unit of the CRCs: what a reader must read, at the least, to trust one token


def digest_file(path: Path) -> tuple[str, np.ndarray]:
    """Read `path` once: its SHA-256 in hexadecimal and the CRC-32 of each of its blocks (uint32 [blocks])."""
    digest = hashlib.sha256()
    blocks: list[int] = []
    with naming(path), open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            blocks.append(zlib.crc32(block))
    return digest.hexdigest(), np.asarray(blocks, dtype=np.uint32)
