"""What the processes of a world tell each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotmamba.world import World
from tests.distributed.worlds import run_world

pytestmark = pytest.mark.timeout(120)


def collectives(world: World) -> dict[str, Any]:
    mine = torch.tensor([world.rank, 1.0], dtype=torch.float64)
    return {
        "sum": world.sum(mine).tolist(),
        "kept": mine.tolist(),
        "any of one": world.any(world.rank == 1),
        "any of none": world.any(False),
        "broadcast": world.broadcast({"step": [world.rank]}),
        "gather": world.gather([world.rank, "x"]),
        "main": world.is_main,
    }


def test_collectives() -> None:
    for rank, results in enumerate(run_world(3, collectives)):
        assert results == {
            "sum": [3.0, 3.0],
            "kept": [rank, 1.0],
            "any of one": True,
            "any of none": False,
            "broadcast": {"step": [0]},
            "gather": [[0, "x"], [1, "x"], [2, "x"]] if rank == 0 else None,
            "main": rank == 0,
        }


def test_a_process_alone() -> None:
    """It initialises nothing."""
    assert collectives(World.alone(torch.device("cpu"))) == {
        "sum": [0.0, 1.0],
        "kept": [0.0, 1.0],
        "any of one": False,
        "any of none": False,
        "broadcast": {"step": [0]},
        "gather": [[0, "x"]],
        "main": True,
    }
    assert not torch.distributed.is_initialized()
