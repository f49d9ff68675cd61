"""The same seed and global batch give the same losses on any engine, any number of processes, with any accumulation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from slotmamba.global_step import StepResult
from slotmamba.world import World
from tests.distributed.tiny import SEQ2SEQ, SINGLE, fsdp2, trained, zero
from tests.distributed.worlds import run_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS, STEPS = 16, 20
ENGINES = {
    1: {"fsdp2": fsdp2(1), "ZeRO-3": zero(3, 1)},
    2: {"fsdp2": fsdp2(2), "ZeRO-1": zero(1, 2), "ZeRO-2": zero(2, 2), "ZeRO-3": zero(3, 2)},
    4: {"fsdp2": fsdp2(4), "HSDP": fsdp2(2, replicate=2)},
}


def alone(folder: Path, overrides: list[str], count: int) -> list[StepResult]:
    world = World.alone(torch.device("cpu"))
    return trained(world, folder, [[*SINGLE, f"train.micro_batch={ROWS}", *overrides]], count)[0]


def assert_close(found: list[StepResult], expected: list[StepResult]) -> None:
    """Losses to 1e-5 relative, float32 sums in another order over 20 steps; the small norm and balance term to 1e-4."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.labelled_tokens == other.labelled_tokens
        assert one.source_losses.keys() == other.source_losses.keys()
        for value, wanted in [
            (one.loss, other.loss),
            *((one.source_losses[name], loss) for name, loss in other.source_losses.items()),
        ]:
            assert math.isclose(value, wanted, rel_tol=1e-5), f"step {number}: {one} is not {other}"
        for value, wanted in [(one.grad_norm, other.grad_norm), (one.balance, other.balance)]:
            assert math.isclose(value, wanted, rel_tol=1e-4), f"step {number}: {one} is not {other}"


@pytest.mark.parametrize("size", ENGINES)
def test_losses(tmp_path: Path, size: int) -> None:
    expected = alone(tmp_path, [], STEPS)
    assert expected[-1].loss < expected[0].loss
    settings = {
        (name, accumulation): [*overrides, f"train.micro_batch={ROWS // size // accumulation}"]
        for name, overrides in ENGINES[size].items()
        for accumulation in (1, 4)
    }
    for results in run_world(size, trained, tmp_path, list(settings.values()), STEPS, seconds=240):
        for found in results:
            assert_close(found, expected)


def test_losses_of_an_encoder_decoder(tmp_path: Path) -> None:
    """Weight decay off for gates and the like, injection, an untied output matrix, offloading."""
    model = [*SEQ2SEQ, "model.tie_embeddings=false"]
    expected = alone(tmp_path, model, 6)
    engines = [
        fsdp2(2),
        [*fsdp2(2), "parallel.cpu_offload=true"],
        zero(2, 2),
        [*zero(3, 2), "parallel.cpu_offload=true"],
    ]
    settings = [[*model, *engine, "train.micro_batch=2"] for engine in engines]
    for results in run_world(2, trained, tmp_path, settings, 6, seconds=240):
        for found in results:
            assert_close(found, expected)
