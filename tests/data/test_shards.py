from __future__ import annotations

import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotmamba_data import MQARSetting, MQARSpec, ShardFolder, ShardWriter, build_mqar, generate_mqar, verify
from slotmamba_data.blocks import BLOCK_BYTES
from slotmamba_data.errors import CorruptShardError, InputError
from slotmamba_data.shards import Shard

LENGTHS = [1, 2, 500, 3000, 7, 9000, 40, 41, 42, 20_000]


@pytest.fixture
def shards(tmp_path: Path, make_shards: Any) -> tuple[Path, list[np.ndarray]]:
    documents = make_shards(tmp_path / "shards", LENGTHS)
    return tmp_path / "shards", documents


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def counts(folder: ShardFolder) -> list[int]:
    return [count for shard in range(len(folder.manifest.shards)) for count in folder.index(shard).counts.tolist()]


def test_documents_and_their_parts_come_back(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, documents = shards
    folder = ShardFolder(path)
    assert len(folder.manifest.shards) > 2
    assert folder.manifest.documents == len(documents)
    assert folder.manifest.tokens == sum(LENGTHS)
    assert counts(folder) == LENGTHS
    for number in (9, 0, 5, 3, 1, 2, 4, 6, 7, 8):
        np.testing.assert_array_equal(folder.tokens(number), documents[number])
        middle = LENGTHS[number] // 2
        np.testing.assert_array_equal(
            folder.tokens(number, middle // 2, middle), documents[number][middle // 2 : middle]
        )
    assert folder.tokens(0).dtype == np.uint16
    assert verify(path) == folder.manifest
    folder.close()
    np.testing.assert_array_equal(folder.tokens(3), documents[3])  # opens again
    folder.close()


def test_spans_of_a_shard_run_over_its_documents(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, documents = shards
    folder = ShardFolder(path)
    first = 0
    for number, entry in enumerate(folder.manifest.shards):
        own = documents[first : first + entry.documents]
        first += entry.documents
        index, stream = folder.index(number), np.concatenate(own)
        assert index.counts.tolist() == [len(document) for document in own]
        assert index.ends[-1] == entry.tokens == len(stream)
        for start, stop in ((0, len(stream)), (0, 0), (1, len(stream) // 2), (len(stream) - 1, len(stream))):
            np.testing.assert_array_equal(folder.read_span(number, start, stop), stream[start:stop])
        np.testing.assert_array_equal(folder.read(number, len(own) - 1), own[-1])


def test_webdataset_reads_the_shards(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, documents = shards
    names = [str(path / entry.name) for entry in ShardFolder(path).manifest.shards]
    samples = list(webdataset.WebDataset(names, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    read = []
    for sample in samples:
        read += np.split(sample["tokens.npy"], sample["ends.npy"])[:-1]
        assert sample["json"]["tokens"] == len(sample["tokens.npy"]) == sample["ends.npy"][-1]
        assert sample["json"]["documents"] == len(sample["ends.npy"])
    assert len(read) == len(documents)
    for mine, document in zip(read, documents, strict=True):
        np.testing.assert_array_equal(mine, document)


def test_samples_hold_many_documents_or_one_long_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(0, 3, 5000), 70_000, 0, 1, 65_536, *rng.integers(0, 3, 4096), 200_000, 1]
    documents = [rng.integers(0, 500, length) for length in lengths]
    with ShardWriter(tmp_path, vocab_size=500, shard_bytes=300_000) as writer:
        for number, document in enumerate(documents):
            writer.add(document, meta={"source": "odd" if number % 2 else "even", "id": number, "same": [1]})
    folder = ShardFolder(tmp_path, kept_open=1)
    assert counts(folder) == lengths
    first = 0
    for shard, entry in enumerate(folder.manifest.shards):
        own = documents[first : first + entry.documents]
        stream = np.concatenate(own)
        np.testing.assert_array_equal(folder.read_span(shard, 0, entry.tokens), stream)
        for start, stop in np.sort(rng.integers(0, entry.tokens + 1, (20, 2))):
            np.testing.assert_array_equal(folder.read_span(shard, start, stop), stream[start:stop])
        for document in {0, *rng.integers(0, len(own), 50).tolist(), len(own) - 1}:
            np.testing.assert_array_equal(folder.read(shard, document), own[document])
            number = first + document
            known = folder.meta(shard, document)
            assert known == {"source": "odd" if number % 2 else "even", "id": number, "same": [1]}
        first += len(own)
    assert {name: count.documents for name, count in folder.manifest.sources.items()} == {"even": 4551, "odd": 4551}
    assert sum(count.tokens for count in folder.manifest.sources.values()) == sum(lengths)
    with tarfile.open(tmp_path / folder.manifest.shards[0].name) as tar:
        samples = [member.name for member in tar if member.name.endswith(".ends.npy")]
    assert len(samples) == 3  # of 4096 documents, up to the one of 70,000 tokens, and up to that of 65,536
    folder.close()


def test_shard_without_documents(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=10) as writer:
        writer.add(np.arange(10))
    empty = Shard(tmp_path / "shard-000001.tar", "000001").finish()
    manifest = ShardFolder(tmp_path).manifest
    replace(manifest, shards=(empty, *manifest.shards)).write(tmp_path)
    folder = ShardFolder(tmp_path)
    assert counts(folder) == [10]
    assert folder.read_span(0, 0, 0).tolist() == [] and folder.read_span(1, 0, 10).tolist() == list(range(10))
    np.testing.assert_array_equal(folder.tokens(0), np.arange(10))
    verify(tmp_path)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32), (10**6, np.uint32)])
def test_token_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    tokens = np.array([0, 5, vocab_size - 1])
    with ShardWriter(tmp_path, vocab_size=vocab_size) as writer:
        writer.add(tokens)
    read = ShardFolder(tmp_path).tokens(0)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, tokens)


def test_recall_samples_keep_labels_and_encoder(tmp_path: Path) -> None:
    spec = MQARSpec((MQARSetting(9, 5), MQARSetting(12, 20)), vocab_size=128, form="seq2seq")
    build_mqar(spec, [7, 3], tmp_path / "shards", seed=5)
    folder = ShardFolder(tmp_path / "shards")
    assert (folder.manifest.kind, folder.manifest.form, folder.manifest.documents) == ("mqar", "seq2seq", 10)
    number = 0
    for setting, count in zip(spec.settings, (7, 3), strict=True):
        samples = generate_mqar(spec, setting, np.arange(count), seed=5, stream="build")
        assert samples.encoder is not None
        for tokens, labels, encoder in zip(samples.tokens, samples.labels, samples.encoder, strict=True):
            np.testing.assert_array_equal(folder.tokens(number), tokens)
            np.testing.assert_array_equal(folder.labels(number), labels)
            np.testing.assert_array_equal(folder.encoder_tokens(number), encoder)
            number += 1
    assert folder.meta(0, 3) == {"source": "9x5", "sample": 3}
    assert {name: count.documents for name, count in folder.manifest.sources.items()} == {"9x5": 7, "12x20": 3}
    names = [folder.where(entry.name) for entry in folder.manifest.shards]
    first = next(iter(webdataset.WebDataset(names, shardshuffle=False).decode()))
    np.testing.assert_array_equal(first["encoder.npy"][: first["encoder_ends.npy"][0]], folder.encoder_tokens(0))
    np.testing.assert_array_equal(first["labels.npy"][: first["ends.npy"][0]], folder.labels(0))


def test_same_documents_give_the_same_bytes(tmp_path: Path, make_shards: Any) -> None:
    for name in ("a", "b"):
        make_shards(tmp_path / name, LENGTHS)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with tarfile.open(tmp_path / "a/shard-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_truncated_shard_is_found_on_opening(shards: tuple[Path, list[np.ndarray]]) -> None:
    path = shards[0] / "shard-000001.tar"
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ValueError, match=r"shard-000001\.tar has \d+ bytes instead of \d+: it was truncated"):
        ShardFolder(shards[0])


def test_shard_truncated_under_a_reader(shards: tuple[Path, list[np.ndarray]]) -> None:
    folder = ShardFolder(shards[0])
    os.truncate(shards[0] / folder.manifest.shards[-1].name, 20_000)
    with pytest.raises(ValueError, match=r"has 20000 bytes instead of \d+: it was truncated or replaced"):
        folder.tokens(9)
    folder.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shard-000001.tar", r"shard .*shard-000001\.tar is missing: build"),
        ("shard-000001.index.npz", r"index .*shard-000001\.index\.npz is missing: build.*`slotmamba data build`"),
        ("manifest.json", r"holds no manifest\.json, so it is not a complete folder.*`slotmamba data build`"),
    ],
)
def test_missing_file_is_named(shards: tuple[Path, list[np.ndarray]], name: str, message: str) -> None:
    (shards[0] / name).unlink()
    with pytest.raises(ValueError, match=message):
        ShardFolder(shards[0])


def test_missing_folder_and_folder_of_splits(tmp_path: Path, make_shards: Any) -> None:
    with pytest.raises(ValueError, match=r"none does not exist: build it with `slotmamba data build`"):
        ShardFolder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file, not a folder of shards: build it with"):
        ShardFolder(tmp_path / "file")
    make_shards(tmp_path / "out/val", [5])
    with pytest.raises(ValueError, match=r"did you mean .*out/val"):
        ShardFolder(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "shards": []}', '{"format": 1, "shards": [{"nome": 1}]}'])
def test_manifest_that_cannot_be_read(shards: tuple[Path, list[np.ndarray]], text: str) -> None:
    (shards[0] / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json.*build the folder again"):
        ShardFolder(shards[0])


def test_damaged_index_is_named(shards: tuple[Path, list[np.ndarray]]) -> None:
    flip(shards[0] / "shard-000002.index.npz", 300)
    with pytest.raises(ValueError, match=r"shard-000002\.index\.npz is not the one that was written"):
        ShardFolder(shards[0]).index(2)


def flip(path: Path, byte: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        old = file.read(1)
        file.seek(byte)
        file.write(bytes([old[0] ^ 0x10]))


def test_damaged_payload_is_named_with_shard_and_byte(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, documents = shards
    last = ShardFolder(path).manifest.shards[-1].name
    damaged = BLOCK_BYTES + 100  # inside the 40,000 bytes of document 9
    flip(path / last, damaged)
    folder = ShardFolder(path)
    message = rf"{last} is damaged between bytes {BLOCK_BYTES} and {2 * BLOCK_BYTES}"
    with pytest.raises(ValueError, match=rf"{message} .*read for document 9 at byte \d+"):
        folder.tokens(9)
    np.testing.assert_array_equal(folder.tokens(9, 17_000, 17_500), documents[9][17_000:17_500])  # past the damage
    np.testing.assert_array_equal(folder.tokens(5), documents[5])
    folder.close()
    with pytest.raises(ValueError, match=message):
        verify(path)
    assert not list(path.parent.glob(f".{path.name}*"))


def test_shard_written_to_or_truncated_after_it_was_read(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, documents = shards
    folder = ShardFolder(path)
    for number in (8, 9, 9, 6):
        np.testing.assert_array_equal(folder.tokens(number), documents[number])
    last = path / folder.manifest.shards[-1].name
    content = last.read_bytes()
    last.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="is damaged between bytes"):
        folder.tokens(9)
    last.write_bytes(content)
    np.testing.assert_array_equal(folder.tokens(9), documents[9])
    os.truncate(last, 5000)
    with pytest.raises(ValueError, match="ends at byte 5000: it was truncated"):
        folder.tokens(9)
    folder.close()


def test_files_of_another_folder_are_named(tmp_path: Path, make_shards: Any) -> None:
    """Of the same names and sizes: a shard, an index, both of them, and a shard that is there twice."""
    documents = make_shards(tmp_path / "a", LENGTHS)
    make_shards(tmp_path / "b", LENGTHS, seed=1)
    tar, index = "shard-000001.tar", "shard-000001.index.npz"
    for names, message in (
        ([tar], rf"{tar} is damaged between bytes 0 and 16384 .*read for document 4 at byte \d+"),
        ([index], rf"index .*{index} is not the one that was written"),
        ([tar, index], rf"index .*{index} is not the one that was written"),
    ):
        shutil.copytree(tmp_path / "a", tmp_path / "c")
        for name in names:
            shutil.copy(tmp_path / "b" / name, tmp_path / "c" / name)
        folder = ShardFolder(tmp_path / "c")
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                folder.read(1, 0)
        np.testing.assert_array_equal(folder.tokens(3), documents[3])
        with pytest.raises(ValueError, match=names[-1]):
            verify(tmp_path / "c")
        folder.close()
        shutil.rmtree(tmp_path / "c")
    shutil.copy(tmp_path / "a/shard-000000.tar", tmp_path / "a" / tar)
    with pytest.raises(ValueError, match=rf"{tar} has \d+ bytes instead of \d+: it was truncated or replaced"):
        ShardFolder(tmp_path / "a")


def test_damage_between_the_arrays_is_found_by_verify_only(shards: tuple[Path, list[np.ndarray]]) -> None:
    """A flipped bit anywhere is found: by whoever reads its block, and otherwise by `verify`."""
    path, documents = shards
    entry = ShardFolder(path).manifest.shards[-1]
    flip(path / entry.name, entry.bytes - 100)  # the end of the tar
    folder = ShardFolder(path)
    np.testing.assert_array_equal(folder.tokens(6), documents[6])
    with pytest.raises(ValueError, match=rf"{entry.name} is damaged between"):
        folder.verify()
    folder.close()


def test_failed_replacement_leaves_the_folder_as_it_was(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, _ = shards
    before = content(path)
    with pytest.raises(KeyboardInterrupt), ShardWriter(path, vocab_size=10, overwrite=True) as writer:
        writer.add(np.arange(10))
        raise KeyboardInterrupt
    assert content(path) == before
    assert not list(path.parent.glob(f".{path.name}*"))


def test_every_flipped_byte_is_found_by_verify(tmp_path: Path, make_shards: Any) -> None:
    make_shards(tmp_path / "whole", [300, 20])
    size = (tmp_path / "whole/shard-000000.tar").stat().st_size
    for byte in range(0, size, size // 20):
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        flip(tmp_path / "copy/shard-000000.tar", byte)
        with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged"):
            verify(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    tokens = np.arange(5)
    with ShardWriter(tmp_path / "lm", vocab_size=5) as writer:
        writer.add(tokens)
        for wrong in (tokens + 1, tokens - 1, tokens[None]):
            with pytest.raises(ValueError, match="tokens"):
                writer.add(wrong)
        with pytest.raises(ValueError, match="wrong set of labels"):
            writer.add(tokens, labels=tokens)
    assert ShardFolder(tmp_path / "lm").manifest.documents == 1
    with ShardWriter(tmp_path / "mqar", vocab_size=5, kind="mqar") as writer:
        writer.add(tokens, labels=tokens)
        with pytest.raises(ValueError, match="wrong set of labels"):
            writer.add(tokens)
        with pytest.raises(ValueError, match="labels of shape"):
            writer.add(tokens, labels=tokens[1:])
        with pytest.raises(ValueError, match="wrong set of labels"):
            writer.add(tokens, labels=tokens, encoder=tokens)
    with pytest.raises(ValueError, match="no seq2seq form"):
        ShardWriter(tmp_path / "other", vocab_size=5, form="seq2seq")
    for vocab_size in (0, 2**31 + 1):
        with pytest.raises(ValueError, match=rf"vocab_size={vocab_size}: expected .* at most 2\^31 tokens"):
            ShardWriter(tmp_path / "other", vocab_size=vocab_size)


def test_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not ours")
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, vocab_size=10, shard_bytes=2000) as writer:
        for _ in range(10):
            writer.add(np.arange(10))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no documents"), ShardWriter(tmp_path, vocab_size=10):
        pass
    assert content(tmp_path) == {"notes.txt": b"not ours"}


def test_complete_folder_is_replaced_only_on_request(shards: tuple[Path, list[np.ndarray]]) -> None:
    path, _ = shards
    before = content(path)
    with pytest.raises(ValueError, match="is a complete folder of shards"):
        ShardWriter(path, vocab_size=10)
    assert content(path) == before
    with ShardWriter(path, vocab_size=10, overwrite=True) as writer:
        writer.add(np.arange(10))
        assert content(path) == before, "what is there stays until there is something to put in its place"
    assert sorted(content(path)) == ["manifest.json", "shard-000000.index.npz", "shard-000000.tar"]
    assert json.loads((path / "manifest.json").read_text())["documents"] == 1
    verify(path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 3000), st.just(70_000)), min_size=1, max_size=60),
    shard_bytes=st.sampled_from([1, 500, 20_000, 10**6]),
    vocab_size=st.sampled_from([2, 60_000, 70_000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_documents_come_back(
    lengths: list[int], shard_bytes: int, vocab_size: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, length) for length in lengths]
    path = tmp_path_factory.mktemp("any")
    with ShardWriter(path, vocab_size=vocab_size, shard_bytes=shard_bytes) as writer:
        for document in documents:
            writer.add(document)
    folder = ShardFolder(path, kept_open=2)
    assert counts(folder) == lengths
    for number in rng.permutation(len(documents)).tolist():
        np.testing.assert_array_equal(folder.tokens(number), documents[number])
    spans = [folder.read_span(shard, 0, entry.tokens) for shard, entry in enumerate(folder.manifest.shards)]
    np.testing.assert_array_equal(np.concatenate(spans), np.concatenate(documents))
    folder.close()
    shutil.rmtree(path)


@pytest.mark.parametrize("name", ["documents", "tokens"])
def test_counts_that_the_index_does_not_have_are_named(shards: tuple[Path, list[np.ndarray]], name: str) -> None:
    folder, _ = shards
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1][name] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"manifest of shards \({name} is .*, the shards have"):
        ShardFolder(folder)
    manifest[name] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptShardError, match=r"manifest\.json says that shard-000001\.tar has \d+ documents"):
        ShardFolder(folder).index(1)
    with pytest.raises(CorruptShardError):
        verify(folder)
    for key in ("vocab_size", "documents", "tokens", "kind", "form", "token_dtype"):
        path.write_text(json.dumps({**manifest, key: "x"}))
        with pytest.raises(InputError, match=f"{key}.* '?x'?"):
            ShardFolder(folder)
