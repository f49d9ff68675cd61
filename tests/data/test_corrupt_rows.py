"""Documents that cannot be read: an error that names them, or left out of their rows, the same for every reader."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slotmamba_data import MQARSetting, MQARSpec, Reading, ShardFolder, Source, build_mqar, open_plan

SKIP = Reading(on_corrupt="skip")


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_text(tmp_path: Path, make_shards: Any, caplog: pytest.LogCaptureFixture, packing: Any) -> None:
    documents = make_shards(tmp_path / "shards", [3000] * 12 + [20_000])
    source = Source("text", shards=tmp_path / "shards")
    whole = open_plan([source], 512, seed=0, reading=Reading(packing))
    epoch = whole.describe()[0].contents.rows_per_epoch
    assert epoch is not None
    expected = [whole[number] for number in range(epoch)]
    names = [entry.name for entry in ShardFolder(tmp_path / "shards").manifest.shards]
    flip(tmp_path / "shards" / names[-1], 20_000)  # in the long document
    with pytest.raises(ValueError, match=rf"{names[-1]} is damaged between bytes 16384 and 32768"):
        for number in range(epoch):
            open_plan([source], 512, seed=0, reading=Reading(packing))[number]

    def skipping() -> list[Any]:
        plan = open_plan([source], 512, seed=0, reading=Reading(packing, on_corrupt="skip"))
        return [plan[number] for number in range(epoch)]

    with caplog.at_level(logging.WARNING):
        rows = skipping()
    lost = [
        part.document
        for row, before in zip(rows, expected, strict=True)
        for part in set(before.documents) - set(row.documents)
    ]
    assert len(lost) == len(caplog.records) > sum(row.skipped for row in rows) == len(set(lost))
    assert names[-1] in caplog.text and "left out of row" in caplog.text
    read = missing = 0
    for row, before, again in zip(rows, expected, skipping(), strict=True):
        assert row.documents == tuple(part for part in before.documents if part in row.documents)
        assert row.skipped <= len(before.documents) - len(row.documents)
        np.testing.assert_array_equal(row.tokens, again.tokens)
        position = 0
        for part in row.documents:
            size = part.stop - part.start
            own = documents[part.document][part.start : part.stop]
            np.testing.assert_array_equal(row.tokens[position : position + size], own)
            position += size
        assert row.valid.sum() == position
        read, missing = read + position, missing + int(before.valid.sum()) - position
    assert read + missing == sum(map(len, documents)) and 0 < missing < 20_000


def test_a_truncated_shard(tmp_path: Path, make_shards: Any) -> None:
    """Nothing of it is read, as over http (test_remote.py)."""
    make_shards(tmp_path, [2000] * 12)
    folder = ShardFolder(tmp_path)
    name, lost = folder.manifest.shards[1].name, folder.manifest.shards[1].documents
    first = int(folder.first[1])
    os.truncate(tmp_path / name, 6000)
    source = Source("text", shards=tmp_path)
    with pytest.raises(ValueError, match=rf"source 'text': shard \S+{name} has 6000 bytes instead of \d+"):
        open_plan([source], 512, seed=0)
    plan = open_plan([source], 512, seed=0, reading=SKIP)
    rows = [plan[number] for number in range(-(-24_000 // 512))]
    assert sum(row.skipped for row in rows) == lost
    read = {part.document for row in rows for part in row.documents}
    assert read == set(range(12)) - set(range(first, first + lost))


@pytest.mark.parametrize("form", ["decoder", "seq2seq"])
def test_recall(tmp_path: Path, form: Any) -> None:
    setting = MQARSetting(16, 4)
    build_mqar(MQARSpec((setting,), vocab_size=64, form=form), [2000], tmp_path)
    flip(tmp_path / "shard-000000.tar", 600)
    plan = open_plan([Source("recall", "mqar", shards=tmp_path)], 16, seed=0, reading=SKIP)
    rows = [plan[number] for number in range(2000)]
    skipped = [row for row in rows if row.skipped]
    assert 0 < len(skipped) < 2000
    for row in skipped:
        assert not row.valid.any() and (row.labels == -100).all() and row.documents == ()
        if form == "seq2seq":  # an encoder has to see something
            assert row.encoder_valid is not None and row.encoder_valid.sum() == 1
    assert sum(len(row.documents) for row in rows) == 2000 - len(skipped)


def test_a_damaged_index_is_always_an_error(tmp_path: Path, make_shards: Any) -> None:
    make_shards(tmp_path, [100] * 10)
    flip(tmp_path / "shard-000000.index.npz", 300)
    with pytest.raises(ValueError, match=r"shard-000000\.index\.npz is not the one that was written"):
        open_plan([Source("text", shards=tmp_path)], 64, seed=0, reading=SKIP)[0]
