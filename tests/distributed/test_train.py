"""`slotmamba train` in several processes: the same command, the same records, one process that writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slotmamba.checkpoint.manifest import read_manifest
from tests.distributed.ranks import Launcher
from tests.train.runs import checkpoint, committed, records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Seven rows in micro-batches of one or two do not go round two or four processes.
SETTINGS = [
    "train.eval_every=2",
    "train.eval_rows=7",
    "train.steps=4",
    "train.global_batch_tokens=192",
    "optim.eps=1e-6",
]
WORLDS = {
    "fsdp2": (2, ["parallel.shard=2", "train.micro_batch=2"]),
    "HSDP": (4, ["parallel.shard=2", "parallel.replicate=2", "train.micro_batch=1"]),
    "ZeRO-3": (2, ["parallel.engine=deepspeed", "parallel.zero_stage=3", "train.micro_batch=2"]),
}


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Records with the same keys and, to 1e-4 relative, the same numbers (recall is a share of few tokens: 1e-6)."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == (pytest.approx(other[key], rel=1e-4) if isinstance(value, float) else other[key]), key


@pytest.mark.parametrize("name", WORLDS)
def test_records_do_not_depend_on_the_world(launcher: Launcher, tmp_path: Path, name: str) -> None:
    single = ["parallel={engine: single, shard: 1}", "train.micro_batch=8"]
    alone = launcher.start(tmp_path / "alone", *SETTINGS, *single, size=1)
    assert alone.wait() == [0], alone.err
    size, overrides = WORLDS[name]
    job = launcher.start(tmp_path / "together", *SETTINGS, *overrides, size=size)
    assert job.wait(seconds=240) == [0] * size, job.err

    assert_close(records(tmp_path / "together"), records(tmp_path / "alone"))
    assert [record["kind"] for record in records(tmp_path / "together")].count("validation") == 2
    assert all(rank.out == "" for rank in job.ranks[1:]), "only the main process prints"
    assert "4/4" in job.ranks[0].out and f"of {size} processes" in job.ranks[0].out
    last = committed(tmp_path / "together")[-1]
    assert last == 4
    data = [read_manifest(checkpoint(tmp_path / run, last)).progress["data"] for run in ("alone", "together")]
    assert json.dumps(data[0]) == json.dumps(data[1])
    assert data[0]["samples_consumed"] == 32
