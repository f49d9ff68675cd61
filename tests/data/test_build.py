"""Building: what goes in, and what is left when it is killed or the disk is full."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from slotmamba_data import ShardFolder, Tokenizer, build_text, open_text, verify

BUILD = """
import sys
from pathlib import Path
from slotmamba_data import Tokenizer, build_text
build_text(["austen:val"], Tokenizer(sys.argv[1]), Path(sys.argv[2]), validation=0.2, document_bytes=300,
           shard_bytes=int(sys.argv[3]))
"""


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
    for split in ("train", "val"):
        assert list((tmp_path / "out" / split).iterdir()) == []
    with pytest.raises(ValueError, match="expected a share"):
        build_text([path], tokenizer, tmp_path / "out", validation=1.0)


def test_bad_input_in_the_middle_leaves_no_folder_that_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 1000 + "bad\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1001"):
        build_text([path], tokenizer, tmp_path / "out", shard_bytes=10_000)
    assert list((tmp_path / "out").iterdir()) == []


def start_build(
    tokenizer: Tokenizer, output: Path, shard_bytes: int = 20_000, **options: object
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILD, str(tokenizer.path), str(output), str(shard_bytes)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


def test_killed_build_is_not_complete_and_can_be_run_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    output = tmp_path / "out"
    for shards in (1, 5, 12):  # kill -9 once so many shards are there
        process = start_build(tokenizer, output)
        while process.poll() is None and len(list(output.glob("train/shard-*.tar"))) < shards:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert list(output.glob("train/shard-*.tar"))
        for split in ("train", "val"):
            with pytest.raises(ValueError, match=r"holds no manifest\.json"):
                ShardFolder(output / split)
    process = start_build(tokenizer, output)
    process.communicate()
    assert process.returncode == 0
    build_text(["austen:val"], tokenizer, tmp_path / "whole", validation=0.2, document_bytes=300, shard_bytes=20_000)
    for split in ("train", "val"):
        verify(output / split)
        files = sorted((output / split).iterdir())
        assert [path.name for path in files] == sorted(path.name for path in (tmp_path / "whole" / split).iterdir())
        for path in files:
            assert path.read_bytes() == (tmp_path / "whole" / split / path.name).read_bytes()


@pytest.mark.parametrize(
    ("limit", "shard_bytes", "failed"),
    [(0, 20_000, "shard-000000.tar"), (9000, 20_000, "shard-000000.tar"), (12_000, 6000, "manifest.json")],
)
def test_file_size_limit_is_one_named_error(
    tmp_path: Path, tokenizer: Tokenizer, limit: int, shard_bytes: int, failed: str
) -> None:
    """A limit on file sizes fails a write as a full disk does: at the first byte, in a shard, or in the manifest."""
    output = tmp_path / "out"

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = start_build(tokenizer, output, shard_bytes, preexec_fn=restrict, env=environment)
    _, errors = process.communicate()
    assert process.returncode == 1
    last = errors.decode().splitlines()[-1]
    assert last.startswith("OSError: [Errno 27] File too large: ")
    assert last.endswith(f"/{failed}'") and str(output) in last
    for split in ("train", "val"):
        assert list((output / split).iterdir()) == []


MOUNT = 'mount -t tmpfs -o size=200k none "$1" && exec "$2" -c "$3" "$4" "$1/out" 20000'


def test_full_disk_is_one_named_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "disk").mkdir()
    # A file system of 200 KB, mounted where only the child sees it.
    enter = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(tmp_path / "disk")], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    listing = "; import os; print(sorted(os.listdir(sys.argv[2] + '/train')))"
    code = BUILD.replace("\nbuild_text([", "\ntry: build_text([", 1).rstrip() + (
        "\nexcept OSError as error: print(type(error).__name__, error.errno, error.filename)" + listing
    )
    script = ["sh", "-c", MOUNT, "sh", str(tmp_path / "disk"), sys.executable, code, str(tokenizer.path)]
    done = subprocess.run([*enter, *script], capture_output=True, text=True, check=True)
    error, left = done.stdout.splitlines()
    assert error.startswith("OSError 28 ") and str(tmp_path / "disk/out") in error
    assert left == "[]"


def test_token_counts_agree_with_the_text(tokenizer: Tokenizer, text_shards: Path) -> None:
    manifest = verify(text_shards)
    count = sum(len(tokenizer.encode(text)) + 2 for text in open_text("austen:val", document_bytes=2048))
    assert manifest.tokens == count == int(np.sum(ShardFolder(text_shards).counts))
