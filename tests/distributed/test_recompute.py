"""Activation checkpointing and sequence chunks under every engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_parity import alone, assert_close
from tests.distributed.tiny import SEQ2SEQ, fsdp2, trained, zero
from tests.distributed.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 3
KEPT = {
    "block": ["train.activation_checkpointing=block"],
    "selective": ["train.activation_checkpointing=selective"],
    "three chunks": ["train.sequence_chunks=3"],
    "selective, two chunks": ["train.activation_checkpointing=selective", "train.sequence_chunks=2"],
}


@pytest.mark.parametrize("model", [[], SEQ2SEQ], ids=["", "encoder"])
def test_losses(tmp_path: Path, model: list[str]) -> None:
    """With two micro-batches a process: bitwise those of the engine without, or, with chunks, to 1e-5 relative; and
    those of one process."""
    expected = alone(tmp_path, model, STEPS)
    engines = [fsdp2(2), zero(3, 2)] if model else [fsdp2(2), zero(2, 2), zero(3, 2)]
    settings = [[*model, *engine, "train.micro_batch=4", *kept] for engine in engines for kept in ([], *KEPT.values())]
    for results in run_world(2, trained, tmp_path, settings, STEPS, seconds=240):
        for number in range(0, len(settings), 1 + len(KEPT)):
            plain, *others = results[number : number + 1 + len(KEPT)]
            for (name, kept), found in zip(KEPT.items(), others, strict=True):
                if any("chunks" in key for key in kept):
                    assert_close(found, expected)
                else:
                    assert found == plain, name
