"""Fetch ranges of remote files: over http with urllib3, from everything else through fsspec."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Protocol

from slotmamba_data.errors import InputError


class Fetched(NamedTuple):
    """Bytes of a file and the size of the whole file, None where the store does not say."""

    content: bytes
    size: int | None


class TransientError(Exception):
    """A request failed in a way that may pass; the text says how."""


class MissingError(Exception):
    """There is no such file."""


class Fetcher(Protocol):
    """Gets bytes of files below a base URL."""

    def fetch(self, url: str, first: int = 0, past: int | None = None) -> Fetched:
        """Bytes `first` to `past - 1` of a file, all of it without `past`; fewer where the file ends before.

        Raises:
            MissingError: there is no such file.
            InputError: it may not be read, or not in ranges.
            TransientError: it may work the next time.
        """
        ...


def make_fetcher(url: str, timeout: float, threads: int) -> Fetcher:
    """The fetcher for the protocol of a URL, for so many threads; `timeout` seconds without any data are an error."""
    return HttpFetcher(timeout, threads) if url.startswith(("http://", "https://")) else FsspecFetcher(url)


class HttpFetcher:
    """Ranged GET requests over connections that are kept open."""

    def __init__(self, timeout: float, threads: int) -> None:
        import urllib3

        self._errors = urllib3.exceptions.HTTPError
        self._pool = urllib3.PoolManager(retries=False, timeout=urllib3.Timeout(timeout), maxsize=threads)

    def fetch(self, url: str, first: int = 0, past: int | None = None) -> Fetched:
        # Compressed on the way, the bytes of a range would be those of the compressed file.
        headers = {"Accept-Encoding": "identity"}
        if past is not None:
            headers["Range"] = f"bytes={first}-{past - 1}"
        try:
            response = self._pool.request("GET", url, headers=headers, redirect=True)
        except self._errors as error:
            raise TransientError(str(error)) from error
        status = response.status
        if status in (404, 410):
            raise MissingError(f"{url} does not exist (status {status})")
        if status == 416:
            return Fetched(b"", _size(response.headers.get("Content-Range")))
        if status in (408, 425, 429) or status >= 500:
            raise TransientError(f"status {status} {response.reason}")
        if status == 200 and past is not None:
            raise InputError(f"the server of {url} does not answer requests for a range of bytes: choose another one")
        if status not in (200, 206):
            raise InputError(f"{url} cannot be read: status {status} {response.reason}")
        content = response.data
        return Fetched(content, len(content) if past is None else _size(response.headers.get("Content-Range")))


def _size(content_range: str | None) -> int | None:
    found = re.fullmatch(r"bytes .*/(\d+)", content_range or "")
    return int(found[1]) if found else None


class FsspecFetcher:
    """Ranged reads of whatever store fsspec and its plug-ins know: s3, gs, az, hf, memory ..."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._files: Any = fsspec.core.url_to_fs(url)[0]
        except (ImportError, ValueError) as error:  # no such protocol, or its plug-in is not installed
            raise InputError(f"{url} cannot be read: {error}") from error

    def fetch(self, url: str, first: int = 0, past: int | None = None) -> Fetched:
        try:
            return Fetched(self._files.cat_file(url, start=first, end=past), None)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingError(f"{url} does not exist") from error
        except PermissionError as error:
            raise InputError(f"{url} cannot be read: {error}") from error
        except (OSError, TimeoutError) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error
