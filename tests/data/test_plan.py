from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slotmamba_data import (
    MQARSetting,
    MQARSpec,
    Plan,
    PlanReader,
    Reading,
    Row,
    ShardFolder,
    ShardWriter,
    Source,
    WeightChange,
    build_mqar,
    check_fingerprint,
    open_plan,
)
from slotmamba_data.shard_reader import KEPT_OPEN

IGNORE = -100


def assert_rows_equal(left: Iterable[Row], right: Iterable[Row]) -> None:
    for a, b in zip(left, right, strict=True):
        assert (a.source, a.documents) == (b.source, b.documents)
        for name in ("tokens", "labels", "doc_start", "valid", "encoder_tokens", "encoder_valid"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def assert_row_is_well_formed(row: Row, seq_len: int) -> None:
    for array, dtype in (
        (row.tokens, np.int32),
        (row.labels, np.int32),
        (row.doc_start, np.int32),
        (row.valid, np.bool_),
    ):
        assert array.shape == (seq_len,) and array.dtype == dtype
    starts = []
    position = 0
    for part in row.documents:
        starts += [position] * (part.stop - part.start)
        position += part.stop - part.start
    assert row.valid.tolist() == [True] * position + [False] * (seq_len - position)
    assert row.doc_start.tolist() == starts + [position] * (seq_len - position)
    assert (row.tokens[position:] == 0).all() and (row.labels[position:] == IGNORE).all()


@pytest.mark.parametrize(
    ("lengths", "seq_len"),
    [([1], 8), ([8], 8), ([1, 1, 1], 2), ([5, 30, 1, 2, 17], 8), ([64] * 5, 16), ([3, 700, 11], 50), ([40, 9], 1000)],
)
def test_every_token_and_label_once_an_epoch(
    tmp_path: Path, make_shards: Any, lengths: list[int], seq_len: int
) -> None:
    documents = make_shards(tmp_path / "shards", lengths)
    plan = open_plan([Source("text", shards=tmp_path / "shards")], seq_len, seed=3)
    [report] = plan.describe()
    rows_per_epoch = report.contents.rows_per_epoch
    assert rows_per_epoch == -(-sum(lengths) // seq_len)
    for epoch in range(3):
        rows = [plan[number] for number in range(epoch * rows_per_epoch, (epoch + 1) * rows_per_epoch)]
        seen: defaultdict[int, list[int]] = defaultdict(list)
        for row in rows:
            assert_row_is_well_formed(row, seq_len)
            position = 0
            for part in row.documents:
                assert part.epoch == epoch
                document = documents[part.document]
                size = part.stop - part.start
                np.testing.assert_array_equal(row.tokens[position : position + size], document[part.start : part.stop])
                following = document[part.start + 1 : part.stop + 1].tolist()
                ends = part.stop == len(document)
                assert row.labels[position : position + size].tolist() == following + [IGNORE] * ends
                seen[part.document] += range(part.start, part.stop)
                position += size
        assert {number: sorted(places) for number, places in seen.items()} == {
            number: list(range(length)) for number, length in enumerate(lengths)
        }
        padding = sum(int((~row.valid).sum()) for row in rows)
        assert padding == rows_per_epoch * seq_len - sum(lengths)
        assert report.contents.pad_share == pytest.approx(padding / (rows_per_epoch * seq_len))
        assert sum(not row.valid.all() for row in rows) <= 1
    plan.close()


def test_epochs_differ_and_neighbouring_rows_are_not_neighbours_in_the_text(text_shards: Path) -> None:
    plan = open_plan([Source("text", shards=text_shards)], 64, seed=0)
    rows = plan.describe()[0].contents.rows_per_epoch
    assert rows is not None and rows > 1000
    firsts = [[plan[epoch * rows + n].documents[0][1:3] for n in range(rows)] for epoch in (0, 1)]
    assert firsts[0] != firsts[1]
    lasts = [plan[n].documents[-1] for n in range(rows)]
    followed = sum(
        last.document == first[0] and last.stop == first[1] for last, first in zip(lasts, firsts[0][1:], strict=False)
    )
    assert followed < 10  # one is to be expected
    orders = [order.index(min(order)) for order in firsts]
    assert orders[0] != orders[1]


def test_rows_are_a_pure_function(tmp_path: Path, text_shards: Path, make_shards: Any) -> None:
    make_shards(tmp_path / "more", [50, 60, 700], vocab_size=700)
    sources = [
        Source("text", weight=3, shards=text_shards),
        Source("recall", "mqar", 2, mqar=MQARSpec((MQARSetting(32, 4), MQARSetting(64, 8, 0.5)), vocab_size=512)),
        Source("more", weight=0.5, shards=tmp_path / "more"),
    ]
    # `more` was made without a tokenizer, which is no other tokenizer
    numbers = [*range(200), 10_000, 123_456_789]
    plan = open_plan(sources, 100, seed=1)
    rows = {number: plan[number] for number in numbers}
    shuffled = random.Random(0).sample(numbers, len(numbers))
    again = open_plan(sources, 100, seed=1)
    assert_rows_equal([rows[number] for number in shuffled], [again[number] for number in shuffled])
    other = open_plan(sources, 100, seed=2)
    assert sum(np.array_equal(rows[number].tokens, other[number].tokens) for number in numbers) < 5
    assert plan.vocab_size == 700
    for row in rows.values():
        assert_row_is_well_formed(row, 100)
    with pytest.raises(IndexError, match="row -1"):
        plan[-1]


PROGRAM = """
import hashlib, json, sys
from slotmamba_data import *
plan = open_plan([Source("text", weight=2, shards=sys.argv[1]),
                  Source("recall", "mqar", mqar=MQARSpec((MQARSetting(32, 4),), vocab_size=512))], 96, seed=7)
digest = hashlib.sha256()
for number in map(int, sys.argv[2:]):
    row = plan[number]
    digest.update(row.tokens.tobytes() + row.labels.tobytes() + row.doc_start.tobytes() + row.valid.tobytes())
print(json.dumps([digest.hexdigest(), plan.fingerprint]))
"""


def test_processes_agree(text_shards: Path) -> None:
    def run(hash_seed: str) -> str:
        command = [sys.executable, "-c", PROGRAM, str(text_shards), *map(str, range(50))]
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("1") == run("2")


def test_rows_do_not_change_between_versions(tmp_path: Path, make_shards: Any) -> None:
    """A change here needs a new plan version, so that runs of the old one are refused and not silently reordered."""
    make_shards(tmp_path / "shards", [5, 9, 4])
    sources = [
        Source("text", shards=tmp_path / "shards"),
        Source("recall", "mqar", mqar=MQARSpec((MQARSetting(4, 1),), vocab_size=64)),
    ]
    plan = open_plan(sources, 6, seed=11)
    assert plan.components["plan version"] == "2"
    assert [[tuple(part) for part in plan[number].documents] for number in range(8)] == [
        [(0, 0, 3, 5), (0, 2, 0, 4)],
        [(0, 0, 0, 4)],
        [(0, 1, 6, 9), (0, 0, 0, 3)],
        [(0, 1, 0, 4)],
        [(0, 1, 0, 6)],
        [(0, 2, 0, 4)],
        [(1, 1, 3, 9)],
        [(0, 3, 0, 4)],
    ]
    assert [plan[number].tokens.tolist() for number in (1, 3)] == [[21, 44, 21, 3, 0, 0], [26, 42, 26, 11, 0, 0]]
    fitted = open_plan(sources, 6, seed=11, reading=Reading("best_fit"))
    assert [[tuple(part) for part in fitted[number].documents] for number in range(0, 8, 2)] == [
        [(0, 2, 0, 4)],
        [(0, 0, 0, 5)],
        [(0, 1, 6, 9)],
        [(0, 1, 0, 6)],
    ]


def test_shares_of_tokens_at_every_prefix(text_shards: Path) -> None:
    recall = MQARSpec((MQARSetting(16, 2),), vocab_size=256)
    weights = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    sources = [Source(name, "mqar", weight, mqar=recall) for name, weight in weights.items()]
    sources[0] = Source("a", "lm", 0.5, shards=text_shards)
    plan = open_plan(sources, 16, seed=0)
    assert [report.share for report in plan.describe()] == pytest.approx(list(weights.values()))
    counts: Counter[int] = Counter()
    for number in range(1000):
        counts[plan[number].source] += 1
        for source, weight in enumerate(weights.values()):
            assert abs(counts[source] - weight * (number + 1)) <= 1 + 1e-9


def test_generated_recall_packs_whole_samples_and_repeats_none() -> None:
    spec = MQARSpec((MQARSetting(16, 2), MQARSetting(24, 3, 2.0), MQARSetting(50, 5)), vocab_size=512)
    plan = open_plan([Source("recall", "mqar", mqar=spec)], 50, seed=0)
    rows = [plan[number] for number in range(400)]
    numbers: set[int] = set()
    shapes: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        assert_row_is_well_formed(row, 50)
        shapes[tuple(part.stop for part in row.documents)] += 1
        for part, start in zip(row.documents, sorted(set(row.doc_start[row.valid].tolist())), strict=True):
            numbers.add(part.document)
            labels = row.labels[start : start + part.stop]
            assert np.count_nonzero(labels != IGNORE) == {16: 2, 24: 3, 50: 5}[part.stop]
    assert shapes == {(16, 16, 16): 100, (24, 24): 200, (50,): 100}
    assert len(numbers) == 100 * 3 + 200 * 2 + 100
    texts = {row.tokens.tobytes() for row in rows}
    assert len(texts) == 400
    padding = np.mean([~row.valid for row in rows])
    [report] = plan.describe()
    assert report.contents.pad_share == pytest.approx(padding)
    assert report.contents.rows_per_epoch is None


def test_validation_samples_are_not_training_samples() -> None:
    source = Source("recall", "mqar", mqar=MQARSpec((MQARSetting(16, 2),), vocab_size=512))
    plans = [open_plan([source], 16, seed=0, split=split) for split in ("train", "validation")]
    rows = [{plan[number].tokens.tobytes() for number in range(500)} for plan in plans]
    assert not rows[0] & rows[1]


def test_stored_recall_comes_once_an_epoch_and_whole(tmp_path: Path) -> None:
    spec = MQARSpec((MQARSetting(16, 2), MQARSetting(40, 5)), vocab_size=512)
    build_mqar(spec, [20, 7], tmp_path / "shards", shard_bytes=20_000)
    folder = ShardFolder(tmp_path / "shards")
    plan = open_plan([Source("recall", "mqar", shards=tmp_path / "shards")], 50, seed=0)
    rows_per_epoch = plan.describe()[0].contents.rows_per_epoch
    assert rows_per_epoch == 7 + 7  # three short ones fit a row, one long one
    epochs = []
    for epoch in range(2):
        rows = [plan[number] for number in range(epoch * 14, epoch * 14 + 14)]
        epochs.append([part.document for row in rows for part in row.documents])
        assert sorted(epochs[-1]) == list(range(27))
        for row in rows:
            assert_row_is_well_formed(row, 50)
            position = 0
            for part in row.documents:
                assert part == (epoch, part.document, 0, len(folder.tokens(part.document)))
                np.testing.assert_array_equal(row.tokens[position : position + part.stop], folder.tokens(part.document))
                np.testing.assert_array_equal(row.labels[position : position + part.stop], folder.labels(part.document))
                position += part.stop
    assert epochs[0] != epochs[1]
    padding = np.mean([~plan[number].valid for number in range(14)])
    assert plan.describe()[0].contents.pad_share == pytest.approx(padding)


@pytest.mark.parametrize("stored", [False, True])
def test_seq2seq_rows(tmp_path: Path, stored: bool) -> None:
    spec = MQARSpec((MQARSetting(8, 4), MQARSetting(8, 10)), vocab_size=128, form="seq2seq")
    source = Source("recall", "mqar", mqar=spec)
    if stored:
        build_mqar(spec, [6, 6], tmp_path / "shards")
        source = Source("recall", "mqar", shards=tmp_path / "shards")
    plan = open_plan([source], 12, seed=0)
    assert plan.encoder_length(0) == 22
    for number in range(12):
        row = plan[number]
        assert_row_is_well_formed(row, 12)
        assert len(row.documents) == 1
        assert row.encoder_tokens is not None and row.encoder_valid is not None
        assert row.encoder_tokens.shape == row.encoder_valid.shape == (22,)
        assert (row.encoder_tokens.dtype, row.encoder_valid.dtype) == (np.int32, np.bool_)
        encoder = row.encoder_tokens[row.encoder_valid].tolist()
        assert encoder[0] == 1 and encoder[-1] == 2 and len(encoder) in (10, 22)
        assert not row.encoder_tokens[~row.encoder_valid].any()
        value_of = dict(zip(encoder[1:-1:2], encoder[2:-1:2], strict=True))
        asked = row.labels != IGNORE
        assert asked.sum() == {10: 4, 22: 7}[len(encoder)]
        assert row.labels[asked].tolist() == [value_of[key] for key in row.tokens[asked].tolist()]
    if not stored:
        padding = np.mean([~plan[number].valid for number in range(100)])
        assert plan.describe()[0].contents.pad_share == pytest.approx(padding)


def make_plan(folder: Path, **changes: Any) -> Plan:
    arguments: dict[str, Any] = {"seq_len": 16, "seed": 0, "weight": 2.0, "settings": (MQARSetting(16, 2),)} | changes
    recall = MQARSpec(arguments.pop("settings"), vocab_size=512)
    sources = [
        Source("text", weight=arguments.pop("weight"), shards=folder),
        Source("recall", "mqar", mqar=recall),
    ]
    return open_plan(sources, **arguments)


def test_resuming_repeats_and_skips_nothing(tmp_path: Path, make_shards: Any) -> None:
    make_shards(tmp_path / "shards", [30, 50, 16, 16])
    whole = make_plan(tmp_path / "shards")
    assert whole.describe()[0].contents.rows_per_epoch == 7
    expected = [whole[number] for number in range(60)]
    for batches in ([5, 7, 9], [1, 1, 1], [3, 0, 20], [10, 11, 12], [21, 1, 2]):  # 11 rows hold the first epoch
        reader = PlanReader(make_plan(tmp_path / "shards"))
        rows: list[Row] = []
        for size in batches:  # resume, and resume again
            rows += reader.next_batch(size)
            state = json.loads(json.dumps(reader.state()))
            assert state["samples_consumed"] == len(rows)
            reader = PlanReader.from_state(make_plan(tmp_path / "shards"), state)
        rows += reader.next_batch(60 - len(rows))
        assert_rows_equal(rows, expected)


def test_failed_read_does_not_move_the_reader(tmp_path: Path, make_shards: Any) -> None:
    make_shards(tmp_path / "shards", [30, 50, 16, 16])
    reader = PlanReader(make_plan(tmp_path / "shards"))
    reader.next_batch(1)
    path = tmp_path / "shards/shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"shard-000000\.tar is damaged"):
        reader.next_batch(5)
    assert reader.samples_consumed == 1
    path.write_bytes(content)
    assert_rows_equal(reader.next_batch(5), PlanReader(make_plan(tmp_path / "shards"), start=1).next_batch(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 32}, r"seq_len \(was 16, is 32\)"),
        ({"seed": 5}, r"seed \(was 0, is 5\)"),
        ({"split": "validation"}, r"split \(was train, is validation\)"),
        ({"settings": (MQARSetting(16, 2, 1.5),)}, r"source recall: weight of 16x2 \(was 1\.0, is 1\.5\)"),
        ({"settings": (MQARSetting(12, 2),)}, r"source recall: order of settings \(was 16x2, is 12x2\)"),
        ({"settings": (MQARSetting(16, 2, updates=1),)}, r"order of settings \(was 16x2, is 16x2_updates1\)"),
        ({"reading": Reading("best_fit")}, r"source text: packing \(was concat, is best_fit\)"),
        ({"reading": Reading(shuffle_shards=2)}, r"source text: shuffle_shards \(was 16, is 2\)"),
    ],
)
def test_changed_plan_is_refused_and_named(tmp_path: Path, make_shards: Any, changes: dict, message: str) -> None:
    make_shards(tmp_path / "shards", [30, 50])
    state = PlanReader(make_plan(tmp_path / "shards")).state()
    check_fingerprint(state, make_plan(tmp_path / "shards"))
    with pytest.raises(ValueError, match=message):
        PlanReader.from_state(make_plan(tmp_path / "shards", **changes), state)


def test_changed_shard_is_named_and_a_moved_one_is_not_changed(tmp_path: Path, make_shards: Any) -> None:
    make_shards(tmp_path / "a", [3000, 3000, 3000])
    make_shards(tmp_path / "b", [3000, 3000, 3000])
    make_shards(tmp_path / "c", [3000, 3000])
    with ShardWriter(tmp_path / "d", vocab_size=1000, shard_bytes=8000) as writer:
        folder = ShardFolder(tmp_path / "a")
        for document in range(3):
            writer.add(folder.tokens(document) // (1 + document // 2))
        folder.close()
    state = PlanReader(make_plan(tmp_path / "a")).state()
    check_fingerprint(state, make_plan(tmp_path / "b"))
    with pytest.raises(
        ValueError, match=r"number of shards \(was 2, is 1\).*shard-000001\.tar \(was \w{12}, is absent\)"
    ):
        check_fingerprint(state, make_plan(tmp_path / "c"))
    with pytest.raises(
        ValueError, match=r"changed: source text: shard shard-000001\.tar \(was \w{12}, is \w{12}\)\. Resume"
    ):
        check_fingerprint(state, make_plan(tmp_path / "d"))


def test_sources_that_cannot_be_are_refused(tmp_path: Path, text_shards: Path, make_shards: Any) -> None:
    spec = MQARSpec((MQARSetting(64, 4),))
    recall = Source("recall", "mqar", mqar=spec)
    text = Source("text", shards=text_shards)
    for source, seq_len, message in (
        (recall, 63, "source 'recall': samples of 64 tokens do not fit rows of 63"),
        (replace(text, shards=tmp_path / "none"), 64, "source 'text': .*none does not exist: build it with"),
        (replace(text, kind="mqar"), 64, "source 'text': .* holds data of kind lm, the source is of kind mqar"),
        (text, 0, "seq_len=0"),
    ):
        with pytest.raises(ValueError, match=message):
            open_plan([source], seq_len, seed=0)
    build_mqar(spec, [3], tmp_path / "mqar")
    with pytest.raises(ValueError, match="has samples of 64 tokens, which do not fit rows of 32"):
        open_plan([Source("recall", "mqar", shards=tmp_path / "mqar")], 32, seed=0)
    with pytest.raises(ValueError, match="distinct names"):
        open_plan([recall, recall], 64, seed=0)
    with pytest.raises(ValueError, match="distinct names"):
        open_plan([], 64, seed=0)
    with ShardWriter(tmp_path / "other", vocab_size=700, tokenizer="another") as writer:
        writer.add(np.arange(10))
    with pytest.raises(ValueError, match="different tokenizers"):
        open_plan([text, Source("other", shards=tmp_path / "other")], 64, seed=0)
    for arguments, message in (
        ({"kind": "lm"}, "either `shards` or `mqar`"),
        ({"kind": "lm", "mqar": spec}, "of kind lm needs `shards`"),
        ({"kind": "mqar", "mqar": spec, "shards": "x"}, "either `shards` or `mqar`"),
        ({"kind": "mqar", "mqar": spec, "weight": 0.0}, r"weights \[0\.0\], expected none below 0 and one above"),
        ({"kind": "mqar", "mqar": spec, "weight": -1.0}, "expected none below 0 and one above"),
        ({"kind": "mqar", "mqar": spec, "changes": (WeightChange(0, 2.0),)}, r"changes at rows \[0\], expected rising"),
        ({"kind": "mqar", "mqar": spec, "on_exhausted": "stop"}, "generated samples never run out"),
    ):
        with pytest.raises(ValueError, match=message):
            Source("wrong", **arguments)


def test_more_shards_than_open_files(tmp_path: Path, make_shards: Any) -> None:
    documents = make_shards(tmp_path / "shards", [4000] * 100)
    folder = ShardFolder(tmp_path / "shards")
    assert len(folder.manifest.shards) == 100

    def open_files() -> int:
        return sum(os.path.realpath(each).startswith(str(tmp_path)) for each in Path("/proc/self/fd").iterdir())

    for document in range(100):
        np.testing.assert_array_equal(folder.tokens(document, 5, 9), documents[document][5:9])
    assert 0 < open_files() <= 2 * KEPT_OPEN  # read and mapped
    folder.close()
    assert open_files() == 0


def test_a_row_reads_little_of_a_long_document(
    tmp_path: Path, make_shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "shards", [2_000_000])
    plan = open_plan([Source("text", shards=tmp_path / "shards")], 128, seed=0)
    read: list[int] = []
    pread = os.pread

    def counting_pread(file: int, size: int, offset: int) -> bytes:
        read.append(size)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", counting_pread)
    plan[0]
    assert 0 < sum(read) <= 2 * 16384
