"""What the processes of a world tell each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from slotmamba.errors import SlotMambaError
from slotmamba.world import World, joined
from tests.distributed.ranks import free_port
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


def place(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, port: int) -> None:
    monkeypatch.setattr("slotmamba.world._JOIN_TIMEOUT", timedelta(seconds=1))
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_processes_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 0, 12, free_port())
    expected = "1 of 12 processes have joined within 1 s; missing: rank 1, 2, 3, 4, 5, 6, 7, 8 and 3 more"
    with pytest.raises(SlotMambaError, match=f"^{expected}$"), joined("cpu"):
        pass
    assert not torch.distributed.is_initialized()


def test_rank_0_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    place(monkeypatch, 1, 2, port)
    expected = rf"^rank 1 could not join the others at 127\.0\.0\.1:{port} \(MASTER_ADDR, MASTER_PORT\), or rank 0 "
    with pytest.raises(SlotMambaError, match=expected), joined("cpu"):
        pass


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
