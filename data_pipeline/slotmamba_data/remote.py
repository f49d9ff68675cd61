"""A folder of shards behind http or an object store: ranged reads with read-ahead, retries and a bounded cache."""

from __future__ import annotations

import contextlib
import functools
import getpass
import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slotmamba_data.chunk_cache import ChunkCache
from slotmamba_data.errors import CorruptShardError, InputError
from slotmamba_data.fetch import MissingError, TransientError, make_fetcher
from slotmamba_data.files import sha256_hex
from slotmamba_data.manifest import MANIFEST_NAME, ShardEntry

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 * 1024 * 1024  # what is fetched at once, and kept
_LARGEST_INDEX = 2**31
_THREADS = 4  # that fetch what was not asked for yet
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 30.0  # seconds


@dataclass(frozen=True)
class RemoteSettings:
    """How remote shards are read.

    Attributes:
        cache: folder of the cache; None takes one for this user in the system's folder for temporary files (TMPDIR).
        cache_bytes: how large it may become; several processes share it.
        attempts: how often a request is made before it is an error; the waits between double from 0.25 to 30 seconds.
        timeout: seconds without any data after which a request has failed.

    Raises:
        InputError: a number makes no sense.
    """

    cache: str | Path | None = None
    cache_bytes: int = 32 * 2**30
    attempts: int = 10
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.timeout > 0 or self.cache_bytes < CHUNK_BYTES:
            raise InputError(
                f"attempts={self.attempts}, timeout={self.timeout}, cache_bytes={self.cache_bytes}: expected at least "
                f"1, more than 0, and at least {CHUNK_BYTES}"
            )

    @property
    def cache_folder(self) -> Path:
        if self.cache is not None:
            return Path(self.cache)
        return Path(tempfile.gettempdir()) / f"slotmamba-shards-{getpass.getuser()}"


class RemoteStore:
    """The files of a folder of shards at a URL. Errors of the network are tried again; then they are an OSError."""

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        self._url = url.rstrip("/")
        self._settings = settings
        self._fetcher = make_fetcher(self._url, settings.timeout, _THREADS + 1)
        self._cache = ChunkCache(settings.cache_folder, settings.cache_bytes)
        self._ahead = ReadAhead()

    def where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def manifest(self) -> bytes:
        url = self.where(MANIFEST_NAME)
        try:
            return self._retried(url, lambda: self._fetcher.fetch(url).content)
        except MissingError as error:
            raise InputError(
                f"{error}, so {self._url} is not a complete folder of shards: upload one built with "
                "`slotmamba data build`, all of it"
            ) from error

    def check(self, entries: Sequence[ShardEntry], truncated: bool) -> None:
        """Nothing is cheap here; each shard is checked when it is read."""

    def index(self, entry: ShardEntry) -> bytes:
        key, url = f"index-{entry.index_sha256}", self.where(entry.index)

        def fetch() -> bytes:
            with self._cache.locked(key):
                content = self._cache.read(key, 0, _LARGEST_INDEX)
                if content is None or sha256_hex(content) != entry.index_sha256:
                    content = self._fetcher.fetch(url).content
                    self._cache.put(key, content)
            return content

        return self._found("index", url, fetch)

    def open(self, entry: ShardEntry) -> RemoteFile:
        return RemoteFile(self, entry)

    def expect(self, entries: Sequence[ShardEntry]) -> None:
        """Fetches shards that will be read soon, one after the other, as far as the cache can hold them with others."""
        if sum(entry.bytes for entry in entries) * 2 > self._settings.cache_bytes:
            return
        for entry in entries:
            for number in range(-(-entry.bytes // CHUNK_BYTES)):
                self._ahead.add(_key(entry, number), functools.partial(self._fetch_ahead, entry, number))

    def read(self, entry: ShardEntry, number: int, first: int, past: int) -> bytes:
        """Bytes `first` to `past - 1` of chunk `number` of a shard. When it has to be fetched the next one is, too."""
        content = self._cache.read(_key(entry, number), first, past)
        if content is not None:
            return content
        if (number + 1) * CHUNK_BYTES < entry.bytes:
            following = functools.partial(self._fetch_ahead, entry, number + 1)
            self._ahead.add(_key(entry, number + 1), following, first=True)
        return self._fetch(entry, number)[first:past]

    def _fetch_ahead(self, entry: ShardEntry, number: int) -> None:
        """Fetch a chunk into the cache. A failure is none yet: whoever needs the chunk fetches it again."""
        if not self._cache.has(_key(entry, number)):
            with contextlib.suppress(OSError, InputError):
                self._fetch(entry, number)

    def _fetch(self, entry: ShardEntry, number: int) -> bytes:
        """All of a chunk; it is fetched by one process alone, and by the others found in the cache."""
        key, url = _key(entry, number), self.where(entry.name)
        first = number * CHUNK_BYTES
        past = min(first + CHUNK_BYTES, entry.bytes)

        def fetch() -> bytes:
            with self._cache.locked(key):  # not while waiting for the next attempt
                content = self._cache.read(key, 0, CHUNK_BYTES)
                if content is None:
                    content, size = self._fetcher.fetch(url, first, past)
                    if size is not None and size != entry.bytes:
                        raise CorruptShardError(
                            f"shard {url} has {size} bytes instead of {entry.bytes}: it was truncated or replaced; "
                            "upload it again"
                        )
                    self._cache.put(key, content)
            return content

        return self._found("shard", url, fetch)

    def forget(self, entry: ShardEntry, number: int) -> None:
        """Drop a chunk, so that it is fetched anew."""
        self._cache.forget(_key(entry, number))

    def _found(self, what: str, url: str, fetch: Callable[[], bytes]) -> bytes:
        try:
            return self._retried(url, fetch)
        except MissingError as error:
            raise CorruptShardError(f"{what} {url} is missing: upload the folder again") from error

    def _retried(self, url: str, fetch: Callable[[], bytes]) -> bytes:
        """What `fetch` returns, after as many attempts as it takes or the settings allow."""
        began = time.monotonic()
        delay = _FIRST_DELAY
        for attempt in range(1, self._settings.attempts + 1):
            try:
                return fetch()
            except TransientError as error:
                if attempt == self._settings.attempts:
                    seconds = time.monotonic() - began
                    raise ConnectionError(
                        f"{url} could not be read in {attempt} attempts within {seconds:.0f} s: {error}"
                    ) from error
                logger.warning("%s: %s; attempt %d follows in %.2f s", url, error, attempt + 1, delay)
                time.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
        raise AssertionError("there is at least one attempt")

    def close(self) -> None:
        self._ahead.close()


def _key(entry: ShardEntry, number: int) -> str:
    return f"{entry.sha256}-{number:06d}"


class ReadAhead:
    """Does things in the background, by a few threads that do not keep the process alive."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, Callable[[], None]] = OrderedDict()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def add(self, key: str, task: Callable[[], None], first: bool = False) -> None:
        """Queue a task, unless one of its key is queued; `first`: before all others."""
        with self._changed:
            self._waiting.setdefault(key, task)
            if first:
                self._waiting.move_to_end(key, last=False)
            while len(self._threads) < _THREADS:
                self._threads.append(threading.Thread(target=self._work, name="shard-ahead", daemon=True))
                self._threads[-1].start()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if threading.current_thread() not in self._threads:
                        return
                    self._changed.wait()
                task = self._waiting.popitem(last=False)[1]
            task()

    def close(self) -> None:
        """Drop what is queued, and end the threads when they have done what they are at; `add` starts others."""
        with self._changed:
            self._waiting.clear()
            self._threads.clear()
            self._changed.notify_all()


class RemoteFile:
    """A shard of a remote store."""

    def __init__(self, store: RemoteStore, entry: ShardEntry) -> None:
        self._store, self._entry = store, entry

    def read(self, first: int, past: int) -> bytes:
        parts = []
        while first < past:
            number = first // CHUNK_BYTES
            end = min(past, (number + 1) * CHUNK_BYTES)
            before = number * CHUNK_BYTES
            parts.append(self._store.read(self._entry, number, first - before, end - before))
            if len(parts[-1]) < end - first:  # what follows would be taken for what is missing
                break
            first = end
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_again(self, first: int, past: int) -> bytes:
        for number in range(first // CHUNK_BYTES, -(-past // CHUNK_BYTES)):
            self._store.forget(self._entry, number)
        return self.read(first, past)

    def mapped(self, first: int, past: int) -> memoryview | None:
        return None

    def close(self) -> None:
        """The store keeps no file open."""
