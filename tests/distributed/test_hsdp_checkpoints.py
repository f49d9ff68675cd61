"""Checkpoints of HSDP: each of its replicas holds all shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from slotmamba.checkpoint.manifest import read_manifest, step_name
from tests.distributed.saved_runs import resume, save_after
from tests.distributed.tiny import SINGLE, fsdp2
from tests.distributed.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_resumes_on_another_world(tmp_path: Path) -> None:
    """Exactly the same weights and moments; then the same losses to 1e-4 relative, and bit for bit on the same mesh."""
    mesh = fsdp2(2, replicate=2)
    saved, expected = run_world(4, save_after, tmp_path, mesh, 3)[0]
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / step_name(3))
    assert (manifest.engine, manifest.world_size, manifest.updates) == ("fsdp2", 4, 3)
    for size, settings in ((4, mesh), (4, fsdp2(4)), (2, fsdp2(2)), (1, SINGLE)):
        step, restored, losses = run_world(size, resume, tmp_path, settings)[0]
        assert step == 3
        assert restored == saved
        assert losses == (expected if settings == mesh else pytest.approx(expected, rel=1e-4))


def test_goes_on_from_another_world(tmp_path: Path) -> None:
    saved, expected = run_world(1, save_after, tmp_path, SINGLE, 3)[0]
    step, restored, losses = run_world(4, resume, tmp_path, fsdp2(2, replicate=2))[0]
    assert (step, restored) == (3, saved)
    assert losses == pytest.approx(expected, rel=1e-4)
