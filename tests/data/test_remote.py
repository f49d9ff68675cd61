"""Shards behind http and other stores: the same stream whatever the network does, errors that name what is wrong."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from slotmamba_data import Reading, ShardFolder, Source, open_plan, remote
from slotmamba_data.chunk_cache import ChunkCache
from slotmamba_data.remote import RemoteSettings
from slotmamba_data.store import read_manifest
from tests.data.serving import BadNetwork, Nginx

LENGTHS = [1, 0, 30_000, 5, 2000, 50_000, 700, 1, 70_000, 20_000, 3, 3, 40_000]


@pytest.fixture
def shards(tmp_path: Path, make_shards: Any) -> Path:
    make_shards(tmp_path / "served/shards", LENGTHS)
    return tmp_path / "served/shards"


@pytest.fixture
def nginx(tmp_path: Path, shards: Path) -> Iterator[Nginx]:
    # nginx drops its rights where it is started as root.
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o755)
    server = Nginx(tmp_path / "served", tmp_path / "nginx")
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests for little data, and short waits."""
    monkeypatch.setattr(remote, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(remote, "_FIRST_DELAY", 0.02)


def settings(tmp_path: Path, **changes: Any) -> RemoteSettings:
    return RemoteSettings(**{"cache": tmp_path / "cache", "timeout": 10.0, **changes})


def stream(folder: ShardFolder) -> Iterator[np.ndarray]:
    """All documents in an order that jumps, and spans of the shards."""
    places = [
        (shard, document) for shard, entry in enumerate(folder.manifest.shards) for document in range(entry.documents)
    ]
    for shard, document in [*places[::2], *places[::-2]]:
        yield folder.read(shard, document)
    for shard, entry in enumerate(folder.manifest.shards):
        for start in range(0, entry.tokens, 9999):
            yield folder.read_span(shard, start, min(start + 9999, entry.tokens))


def assert_same(folder: ShardFolder, local: Path) -> None:
    for mine, expected in itertools.zip_longest(stream(folder), stream(ShardFolder(local))):
        np.testing.assert_array_equal(mine, expected)


def test_http_gives_the_local_stream_and_fetches_everything_once(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    url = f"{nginx.url}/shards"
    for _ in range(2):  # the second time from the cache
        folder = ShardFolder(url, remote=settings(tmp_path))
        folder.expect(range(len(folder.manifest.shards)))
        assert_same(folder, shards)
        assert folder.where("shard-000000.tar") == f"{url}/shard-000000.tar"
        folder.close()
    assert read_manifest(url, settings(tmp_path)) == folder.manifest
    requests = [request for request in nginx.requests() if ".tar" in request]
    chunks = sum(-(-entry.bytes // 40_000) for entry in folder.manifest.shards)
    assert len(requests) == chunks and all(request.endswith(" 206") for request in requests)


def test_processes_share_the_cache(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    program = (
        "import sys; from slotmamba_data import ShardFolder, remote\n"
        "remote.CHUNK_BYTES = 40_000\n"
        "folder = ShardFolder(sys.argv[1], remote=remote.RemoteSettings(cache=sys.argv[2]))\n"
        "for shard, entry in enumerate(folder.manifest.shards): folder.read_span(shard, 0, entry.tokens)\n"
    )
    command = [sys.executable, "-c", program, f"{nginx.url}/shards", str(tmp_path / "cache")]
    for process in [subprocess.Popen(command) for _ in range(4)]:
        assert process.wait(60) == 0
    manifest = read_manifest(shards)
    requests = [request for request in nginx.requests() if ".tar" in request]
    assert len(requests) == sum(-(-entry.bytes // 40_000) for entry in manifest.shards)


@pytest.mark.slow
def test_server_that_dies_and_comes_back(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path))
    expected = stream(ShardFolder(shards))
    restart = threading.Timer(0, lambda: None)
    restart.start()
    for number, mine in enumerate(stream(folder)):
        np.testing.assert_array_equal(mine, next(expected))
        if number % 7 == 3:
            restart.join()
            nginx.kill()
            restart = threading.Timer(0.3, nginx.start)
            restart.start()
            shutil.rmtree(tmp_path / "cache")  # or what comes next could be there already
            (tmp_path / "cache").mkdir()
    assert next(expected, None) is None
    folder.close()
    restart.join()


@pytest.mark.slow
def test_network_that_refuses_cuts_and_delays(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    network = BadNetwork(nginx.port, hold=0.5)
    folder = ShardFolder(f"{network.url}/shards", remote=settings(tmp_path, timeout=0.25))
    assert_same(folder, shards)
    assert network.faults > 5
    folder.close()
    network.close()


def test_server_that_stays_away_is_one_error(tmp_path: Path, nginx: Nginx) -> None:
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path, attempts=3))
    folder.index(0)
    nginx.kill()
    with pytest.raises(
        ConnectionError, match=r"/shards/shard-000000\.tar could not be read in 3 attempts within 0 s: .*"
    ):
        folder.read(0, 2)
    with pytest.raises(ConnectionError, match=r"/shards/manifest\.json could not be read in 3 attempts"):
        ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path, attempts=3))


def test_what_the_server_lacks_is_named(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    with pytest.raises(ValueError, match=r"/none/manifest\.json does not exist .* is not a complete folder of shards"):
        ShardFolder(f"{nginx.url}/none", remote=settings(tmp_path))
    with pytest.raises(ValueError, match=r"/secret/manifest\.json cannot be read: status 403"):
        ShardFolder(f"{nginx.url}/secret", remote=settings(tmp_path))
    whole = ShardFolder(f"{nginx.url}/whole/shards", remote=settings(tmp_path))
    with pytest.raises(ValueError, match="does not answer requests for a range"):
        whole.read(0, 2)
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path))
    (shards / "shard-000000.tar").unlink()
    (shards / "shard-000001.index.npz").unlink()
    with pytest.raises(ValueError, match=r"shard http.*/shard-000000\.tar is missing: upload"):
        folder.read(0, 2)
    with pytest.raises(ValueError, match=r"index http.*/shard-000001\.index\.npz is missing: upload"):
        folder.index(1)


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


def test_wrong_files_on_the_server_are_named(tmp_path: Path, shards: Path, nginx: Nginx, make_shards: Any) -> None:
    make_shards(tmp_path / "other", LENGTHS, seed=1)
    names = [entry.name for entry in read_manifest(shards).shards]
    flip(shards / names[0], 30_000)
    os.truncate(shards / names[1], 50_000)
    shutil.copy(tmp_path / "other" / names[2], shards / names[2])  # of the same size
    shutil.copy(tmp_path / "other/shard-000003.index.npz", shards)
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{names[0]} is damaged between bytes 16384 and 32768 .*document 2 at"):
            folder.read(0, 2)
        with pytest.raises(ValueError, match=rf"{names[1]} has 50000 bytes instead of \d+: it was truncated or repl"):
            folder.read_span(1, 0, 1000)
        with pytest.raises(ValueError, match=rf"{names[2]} is damaged between"):
            folder.read_span(2, 0, 1000)
        with pytest.raises(ValueError, match=r"shard-000003\.index\.npz is not the one that was written"):
            folder.read(3, 0)
    folder.close()


def test_a_truncated_shard_is_skipped_as_from_a_local_folder(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    os.truncate(shards / read_manifest(shards).shards[1].name, 5000)
    reading = Reading(on_corrupt="skip", remote=settings(tmp_path))
    local, remote = (
        open_plan([Source("text", shards=place)], 64, seed=0, reading=reading)
        for place in (shards, f"{nginx.url}/shards")
    )
    epoch = local.describe()[0].contents.rows_per_epoch
    assert epoch is not None
    skipped = 0
    for number in range(epoch):
        mine, theirs = local[number], remote[number]
        np.testing.assert_array_equal(mine.tokens, theirs.tokens)
        assert (mine.documents, mine.skipped) == (theirs.documents, theirs.skipped)
        skipped += mine.skipped
    assert skipped == read_manifest(shards).shards[1].documents
    local.close()
    remote.close()


def test_damage_in_the_cache_is_repaired(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path))
    assert_same(folder, shards)
    chunks = [path for path in (tmp_path / "cache").iterdir() if path.stat().st_size]
    for number, path in enumerate(chunks):
        if number % 2:
            os.truncate(path, path.stat().st_size // 2)
        else:
            flip(path, path.stat().st_size // 2)
    folder.close()
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path))
    assert_same(folder, shards)
    folder.close()


def test_cache_stays_small(tmp_path: Path, shards: Path, nginx: Nginx) -> None:
    folder = ShardFolder(f"{nginx.url}/shards", remote=settings(tmp_path, cache_bytes=100_000))
    folder.expect(range(len(folder.manifest.shards)))  # more than it can hold
    assert_same(folder, shards)
    folder.close()
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 100_000 * 17 / 16 + 40_000


def test_longest_unused_chunks_go_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 1000)
    for number in range(10):
        cache.put(f"chunk-{number}", bytes(100))
        os.utime(tmp_path / f"chunk-{number}", (number, number))
    assert cache.read("chunk-0", 10, 20) == bytes(10)  # used now
    (tmp_path / "left.tmp").write_bytes(bytes(300))
    os.utime(tmp_path / "left.tmp", (0, 0))  # of a process that was killed
    cache.put("new", bytes(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chunk-0", *(f"chunk-{n}" for n in range(2, 10)), "new"]
    assert cache.read("chunk-1", 0, 5) is None
    with pytest.raises(OSError, match="chunk"):
        ChunkCache(tmp_path / "new" / "chunk", 1000)


def test_fsspec_stores(tmp_path: Path, shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/shards", recursive=True)
    folder = ShardFolder("memory://bucket/shards", remote=settings(tmp_path))
    assert_same(folder, shards)
    folder.close()
    with pytest.raises(ValueError, match=r"memory://bucket/none/manifest\.json does not exist"):
        ShardFolder("memory://bucket/none", remote=settings(tmp_path))
    with pytest.raises(ValueError, match=r"nosuch://bucket cannot be read: .*nosuch"):
        ShardFolder("nosuch://bucket", remote=settings(tmp_path))
    memory.pipe("/bucket/shards/shard-000000.tar", (shards / "shard-000000.tar").read_bytes()[:30_000])
    folder = ShardFolder("memory://bucket/shards", remote=settings(tmp_path, cache=tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"memory://bucket/shards/shard-000000\.tar ends at byte 30000: it was truncated"
    ):
        folder.read(0, 2)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for wrong in ({"attempts": 0}, {"timeout": 0.0}, {"cache_bytes": 1000}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            RemoteSettings(**wrong)


def test_connections_are_kept_for_all_threads_that_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    threads = remote._THREADS + 1
    together = threading.Barrier(threads, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps connections open

        def do_GET(self) -> None:
            together.wait()
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *words: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = remote.RemoteStore(f"http://127.0.0.1:{server.server_port}", settings(tmp_path))
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(2):
                reading = [pool.submit(store.manifest) for _ in range(threads)]
                assert [each.result(timeout=60) for each in reading] == [b"{}"] * threads
        server.shutdown()
        store.close()
    assert "Connection pool is full" not in caplog.text
