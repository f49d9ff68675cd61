"""Read a Zstandard file of any number of frames, and notice when the last is not complete."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

import zstandard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 2**17


class ZstdFile(io.RawIOBase):
    """The decompressed content of `raw`, from the beginning to the end.

    Reading raises EOFError where the file ends within a frame, and where it is not Zstandard at all. The library's own
    reader takes such an end for the end of the content.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._waiting = b""  # decompressed, not read yet
        self._compressed = b""
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._waiting:
            if not self._more():
                return 0
        count = min(len(view), len(self._waiting))
        view[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _more(self) -> bool:
        """Decompress a bit more; False at the end."""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._begun = False
        if not self._compressed:
            self._compressed = self._raw.read(_CHUNK)
        if not self._compressed:
            if self._begun:
                raise EOFError("it ends within a frame")
            return False
        try:
            self._waiting = self._frame.decompress(self._compressed)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        self._begun, self._compressed = True, b""
        return True
