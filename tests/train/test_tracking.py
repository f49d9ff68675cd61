"""Weights & Biases offline, for real: no account, no network."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slotmamba.config.schema import Recipe
from slotmamba.tracking import Tracker

TRAIN = {"kind": "train", "step": 10, "loss": 3.0, "loss/text": 2.5, "skipped": False}
VALIDATION = {"kind": "validation", "step": 10, "source": "text", "loss": 4.0, "recall/64x4": 0.5}


def recipe(mode: str) -> Recipe:
    mqar = {"settings": [{"length": 64, "pairs": 4}]}
    return Recipe.model_validate(
        {
            "name": "tracked",
            "data": {"seq_len": 64, "sources": [{"name": "facts", "kind": "mqar", "mqar": mqar}]},
            "train": {"steps": 10, "global_batch_tokens": 512},
            "logging": {"wandb": {"mode": mode, "project": "a-project"}},
        }
    )


def records_in(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB, parts of records with
    crc32, length and type: 1 whole, 2 first, 3 middle, 4 last)."""
    data = path.read_bytes()
    position, record = 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<4xHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def stored(run_dir: Path) -> list[dict[str, Any]]:
    """The rows logged, as wandb's own files under the run folder have them, in the order in which they were written."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records_in(path):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def own(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


def test_offline_run_and_its_resumption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "slotmamba"):
        first = Tracker(recipe("offline"), tmp_path, None)
        first.log(TRAIN)
        first.log(VALIDATION)
        state = json.loads(json.dumps(first.state()))
        first.close()
        assert state["id"]
        time.sleep(1.1)  # wandb names its folders by the second
        second = Tracker(recipe("offline"), tmp_path, state)
        # A resumed run repeats steps: wandb must not drop them.
        second.log(TRAIN | {"step": 5, "loss": float("nan")})
        second.log(TRAIN)
        assert second.state() == state
        second.close()
    assert not [record for record in caplog.records if record.name.startswith("slotmamba")]
    files = [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert set(files) == {f"run-{state['id']}.wandb"}
    train = {"train/loss": 3.0, "train/loss/text": 2.5, "train/skipped": False}
    deadline = time.monotonic() + 60
    while len(rows := own(stored(tmp_path))) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)  # wandb's own process may still be writing
    assert rows[:2] == [
        {"step": 10, **train},
        {"step": 10, "validation/text/loss": 4.0, "validation/text/recall/64x4": 0.5},
    ]
    assert rows[2]["step"] == 5
    assert rows[3] == {"step": 10, **train}


def test_disabled_does_not_import_wandb(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from slotmamba.config.schema import Recipe
from slotmamba.tracking import Tracker
recipe = Recipe.model_validate_json({recipe("disabled").model_dump_json()!r})
tracker = Tracker(recipe, Path("nowhere"), None)
tracker.log({TRAIN!r})
tracker.close()
assert tracker.state() == {{"id": None}}
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING, "slotmamba"):
        tracker = Tracker(recipe("offline"), tmp_path, {"id": "abc"})
        tracker.log(TRAIN)
        tracker.close()
    assert tracker.state() == {"id": "abc"}
    (message,) = [record.getMessage() for record in caplog.records if record.name == "slotmamba.tracking"]
    assert message.startswith("wandb is off from here on, training goes on: ModuleNotFoundError: import of wandb")


def test_an_error_in_wandb_turns_it_off_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(recipe("offline"), tmp_path, None)
    run = tracker._run
    assert run is not None
    run.finish()
    with caplog.at_level(logging.WARNING, "slotmamba"):
        tracker.log(TRAIN)
        tracker.log(TRAIN)
        tracker.close()
    messages = [record.getMessage() for record in caplog.records if record.name == "slotmamba.tracking"]
    assert len(messages) == 1 and "\n" not in messages[0]
    assert tracker.state() == {"id": run.id}
