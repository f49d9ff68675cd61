"""Building: what goes in, and what is left when it is killed or the disk is full."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from slotmamba_data import (
    MQARSetting,
    MQARSpec,
    ShardFolder,
    Tokenizer,
    build_mqar,
    build_text,
    open_text,
    verify,
)
from slotmamba_data.errors import InputError

BUILD = """
import sys
from pathlib import Path
from slotmamba_data import Tokenizer, build_text
inputs = sys.argv[5:] or ["austen:val"]
build_text(inputs, Tokenizer(sys.argv[1]), Path(sys.argv[2]), validation=0.2, document_bytes=300,
           shard_bytes=int(sys.argv[3]), workers=int(sys.argv[4]), deduplicate=int(sys.argv[4]) > 1)
"""

# Dies once six files were moved.
MOVED_HALF = (
    """
import os, signal
rename, moved = os.rename, []
def rename_or_die(*args):
    moved.append(args)
    if len(moved) > 6: os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.rename = rename_or_die
"""
    + "import slotmamba_data.build\nslotmamba_data.build.os.rename = rename_or_die\n"
)


def test_documents_are_begin_text_end(tokenizer: Tokenizer, text_shards: Path) -> None:
    folder = ShardFolder(text_shards)
    texts = list(open_text("austen:val", document_bytes=2048))
    assert folder.manifest.documents == len(texts)
    assert (folder.manifest.vocab_size, folder.manifest.tokenizer) == (700, tokenizer.digest)
    for number, text in enumerate(texts):
        tokens = folder.tokens(number).tolist()
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(tokens[1:-1]) == text
    assert folder.manifest.about["inputs"] == ["austen:val"]
    folder.close()


def test_validation_split_is_by_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number}" for number in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[::-1], "", ""]))
    manifests = build_text([path], tokenizer, tmp_path / "out", validation=0.25)
    assert manifests["train"].documents + manifests["val"].documents == 400  # the empty ones are left out
    held = {}
    for split in ("train", "val"):
        folder = ShardFolder(tmp_path / "out" / split)
        held[split] = [tokenizer.decode(folder.tokens(number)) for number in range(folder.manifest.documents)]
        folder.close()
    assert not set(held["train"]) & set(held["val"])
    assert sorted(held["train"] + held["val"]) == sorted(texts * 2)
    assert 25 <= len(set(held["val"])) <= 75  # 50 expected, standard deviation 6


def test_split_without_documents_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one document")
    with pytest.raises(ValueError, match="no document went to"):
        build_text([path], tokenizer, tmp_path / "out", validation=0.5)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ValueError, match="expected a share"):
        build_text([path], tokenizer, tmp_path / "out", validation=1.0)


def test_inputs_without_documents_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty, bad, out = tmp_path / "empty.txt", tmp_path / "bad.jsonl", tmp_path / "out"
    empty.touch()
    bad.write_text("no JSON\n" * 3)
    with pytest.raises(InputError, match=r"no documents in .*empty\.txt: nothing is in there"):
        build_text([empty], tokenizer, out)
    with pytest.raises(InputError, match=r"empty\.txt, .*bad\.jsonl: 3 left out \(not JSON\)"):
        build_text([empty, bad], tokenizer, out, skip_bad=True, validation=0.5)
    table = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), table)
    with pytest.raises(InputError, match=r"no documents in .*empty\.parquet: nothing is in there"):
        build_text([table], tokenizer, out)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_in_the_middle_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 1000 + "bad\n" + '{"text": "good"}\n' * 3000)
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1001: not JSON|a\.jsonl, line after byte \d+, number \d+: not JSON"
    ):
        build_text([path], tokenizer, tmp_path / "out", shard_bytes=8000, workers=workers)
    assert list((tmp_path / "out").iterdir()) == []


def start_build(
    tokenizer: Tokenizer,
    output: Path,
    shard_bytes: int = 20_000,
    workers: int = 1,
    inputs: Sequence[str] = (),
    **options: object,
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILD, str(tokenizer.path), str(output), str(shard_bytes), str(workers), *inputs]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    inputs = ["austen:val", "austen:test"]
    output, work = tmp_path / "out", tmp_path / "out/.build/train"
    kept: dict[Path, tuple[int, int]] = {}
    for shards in (1, 7, 20):  # kill -9 once so many shards are finished; the workers are not asked to end
        process = start_build(tokenizer, output, workers=workers, inputs=inputs)
        while process.poll() is None and len(list(work.glob("shard-*.json"))) < shards:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for split in ("train", "val"):
            with pytest.raises(ValueError, match="does not exist"):
                ShardFolder(output / split)
        finished = [record.with_suffix(".tar") for record in work.glob("shard-*.json")]
        assert len(finished) >= shards
        now = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
        assert kept.items() <= now.items(), "a finished shard was written again"
        kept = now
    process = start_build(tokenizer, output, workers=workers, inputs=inputs)
    process.communicate()
    assert process.returncode == 0
    options: dict[str, Any] = {"validation": 0.2, "document_bytes": 300, "shard_bytes": 20_000}
    build_text(inputs, tokenizer, tmp_path / "whole", deduplicate=workers > 1, **options)
    for split in ("train", "val"):
        verify(output / split)
    assert content(output) == content(tmp_path / "whole")
    inodes = {path.stat().st_ino for path in (output / "train").glob("*.tar")}
    assert {inode for inode, _ in kept.values()} <= inodes


def test_two_builds_of_one_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    process = start_build(tokenizer, tmp_path / "out", inputs=["austen:train"])
    while process.poll() is None and not (tmp_path / "out/.build").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=r"another `slotmamba data build` is writing to .*/out"):
                build_text(["austen:val"], tokenizer, tmp_path / "out", overwrite=overwrite)
    finally:
        process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]


def test_build_that_is_killed_while_it_moves_the_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"validation": 0.2, "document_bytes": 300, "shard_bytes": 20_000}
    build_text(["austen:val"], tokenizer, tmp_path / "whole", **options)
    build_text(["austen:val"], tokenizer, tmp_path / "out", validation=0.1)
    code = MOVED_HALF + BUILD.replace("workers=", "overwrite=True, workers=")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer.path), str(tmp_path / "out"), "20000", "1"], timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/train/manifest.json").exists()
    moved = sum(1 for path in content(tmp_path / "out") if path.startswith("train/"))
    assert 0 < moved < sum(1 for path in content(tmp_path / "whole") if path.startswith("train/"))
    build_text(["austen:val"], tokenizer, tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_number_of_workers_changes_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    texts = list(open_text("austen:val", document_bytes=400))
    assert len(texts) >= 400
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts[:300]))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.txt").write_text("".join(texts[300:400]))
    twice = [texts[number] for number in rng.integers(0, 400, 300)]
    (tmp_path / "c.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in twice).encode())
    )
    names = [tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.jsonl.gz"]
    options: dict[str, Any] = {"document_bytes": 400, "validation": 0.3, "shard_bytes": 6000, "deduplicate": True}
    manifests = build_text(names, tokenizer, tmp_path / "one", **options)
    assert len(manifests["train"].shards) > 10
    build_text(names, tokenizer, tmp_path / "three", **options, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    spec = MQARSpec((MQARSetting(64, 4), MQARSetting(128, 8)), vocab_size=512)
    for name, workers in (("four", 1), ("five", 2)):
        build_mqar(spec, [300, 500], tmp_path / name, shard_bytes=50_000, workers=workers)
    assert content(tmp_path / "four") == content(tmp_path / "five")


def test_duplicates_are_left_out_wherever_they_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number}" for number in range(1500)]
    for name, some in (("a", texts[:1000]), ("b", texts[500:]), ("c", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*some, ""]))
    names = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    [manifest] = build_text(names, tokenizer, tmp_path / "out", shard_bytes=5000, deduplicate=True).values()
    folder = ShardFolder(tmp_path / "out")
    assert [tokenizer.decode(folder.tokens(number)) for number in range(manifest.documents)] == texts
    found = {Path(name).stem: (count.documents, count.skipped) for name, count in manifest.sources.items()}
    assert found == {
        "a": (1000, {"empty": 1}),
        "b": (500, {"duplicate": 500, "empty": 1}),
        "c": (0, {"duplicate": 1500, "empty": 1}),
    }
    assert sum(count.tokens for count in manifest.sources.values()) == manifest.tokens
    folder.close()


def test_bad_documents_are_counted_by_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [b'{"content": "one", "source": "web", "id": "x7"}', b"{", b'{"content": 5}', b'{"text": "no"}', b'"\xff"']
    lines += [b'{"content": "\\ud83d"}', b'{"content": "two", "source": "books"}', b'{"content": "three"}', b"[]"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    [manifest] = build_text([path], tokenizer, tmp_path / "out", text_field="content", skip_bad=True).values()
    reasons = {"not JSON": 1, "text is no string": 1, "no content": 2, "not UTF-8": 1, "half a character": 1}
    assert {name: (count.documents, count.skipped) for name, count in manifest.sources.items()} == {
        "web": (1, {}),
        "books": (1, {}),
        str(path): (1, reasons),
    }
    folder = ShardFolder(tmp_path / "out")
    assert [folder.meta(0, document) for document in range(3)] == [
        {"source": "web", "id": "x7"},
        {"source": "books", "id": None},
        {"source": str(path), "id": None},
    ]
    folder.close()


def test_dead_worker_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its shards are kept like those of a build that is killed as a whole, and no worker is left behind."""
    process = start_build(tokenizer, tmp_path / "out", 6000, workers=2, inputs=["austen:val", "austen:test"])
    children: list[int] = []
    while process.poll() is None and not list((tmp_path / "out/.build").glob("train/shard-*.json")):
        time.sleep(0.001)
    for path in Path(f"/proc/{process.pid}/task").glob("*/children"):
        children += map(int, path.read_text().split())
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.decode().splitlines()[-1]
    assert last.startswith("ChildProcessError: build worker ") and "was killed by SIGKILL" in last
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    process = start_build(tokenizer, tmp_path / "out", 6000, inputs=["austen:val", "austen:test"])
    process.communicate(timeout=60)
    assert process.returncode == 0
    verify(tmp_path / "out/train")


@pytest.mark.parametrize(
    ("limit", "failed"), [(0, "settings.json"), (9000, "shard-000000-0000.tar"), (30_000, "piece-000000.json")]
)
def test_file_size_limit_is_one_named_error(tmp_path: Path, tokenizer: Tokenizer, limit: int, failed: str) -> None:
    """A limit on file sizes fails a write as a full disk does: at the first byte, in a shard, or in a record."""
    output = tmp_path / "out"

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = start_build(tokenizer, output, 20_000 if limit < 20_000 else 2000, preexec_fn=restrict, env=environment)
    _, errors = process.communicate()
    assert process.returncode == 1
    last = errors.decode().splitlines()[-1]
    assert last.startswith("OSError: [Errno 27] File too large: ")
    assert last.endswith(f"/{failed}'") and str(output) in last
    assert not list(output.rglob("manifest.json")) and not list(output.rglob("*.tmp"))


MOUNT = 'mount -t tmpfs -o size=200k none "$1" && exec "$2" -c "$3" "$4" "$1/out" 20000 1'


def test_full_disk_is_one_named_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "disk").mkdir()
    # A file system of 200 KB, mounted where only the child sees it.
    enter = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(tmp_path / "disk")], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    listing = "; import os; print(sorted(os.listdir(sys.argv[2])))"
    code = BUILD.replace("\nbuild_text(", "\ntry: build_text(", 1).rstrip() + (
        "\nexcept OSError as error: print(type(error).__name__, error.errno, error.filename)" + listing
    )
    script = ["sh", "-c", MOUNT, "sh", str(tmp_path / "disk"), sys.executable, code, str(tokenizer.path)]
    done = subprocess.run([*enter, *script], capture_output=True, text=True, check=True)
    error, left = done.stdout.splitlines()
    assert error.startswith("OSError 28 ") and str(tmp_path / "disk/out") in error
    assert left == "['.build']"


def test_token_counts_agree_with_the_text(tokenizer: Tokenizer, text_shards: Path) -> None:
    manifest = verify(text_shards)
    count = sum(len(tokenizer.encode(text)) + 2 for text in open_text("austen:val", document_bytes=2048))
    assert manifest.tokens == count
