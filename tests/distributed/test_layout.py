"""Recipes that do not fit the processes are refused with a line that says what to change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from slotmamba.config import Recipe
from slotmamba.engines import build_engine, check_layout
from slotmamba.errors import InputError
from slotmamba.world import World, joined
from tests.distributed.tiny import SINGLE, fsdp2, tiny, zero
from tests.train.runs import fails


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def recipe(folder: Path, *overrides: str) -> Recipe:
    return tiny(folder, list(overrides))


def test_what_fits(folder: Path) -> None:
    check_layout(recipe(folder, *SINGLE), 1)
    check_layout(recipe(folder, *fsdp2(2, replicate=2)), 4)
    check_layout(recipe(folder, *zero(3, 4)), 4)


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        (SINGLE, 2, "engine=single trains in one process, but 2 were started.*engine=fsdp2 parallel.shard=2"),
        (fsdp2(2), 4, r"replicate \* parallel.shard = 1 \* 2 = 2 processes, but 4 were started: start 2"),
        (fsdp2(2, replicate=2), 1, r"= 2 \* 2 = 4 processes, but 1 was started: start 4 \(torchrun --nproc-per-node\)"),
        (zero(2, 4), 2, r"= 4 processes, but 2 were started.*or set them to multiply to 2"),
    ],
)
def test_another_number_of_processes(folder: Path, overrides: list[str], size: int, message: str) -> None:
    world = World(rank=0, size=size, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(InputError, match=message):
        build_engine(recipe(folder, *overrides), world)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*SINGLE, "parallel.shard=2"], r"single is one process, not replicate \* shard = 2: set engine=fsdp2"),
        ([*SINGLE, "parallel.cpu_offload=true"], "cpu_offload needs engine=fsdp2 or deepspeed"),
        ([*SINGLE, "parallel.zero_stage=2"], "zero_stage=2 is for engine=deepspeed, not engine=single: set"),
        ([*fsdp2(2), "parallel.zero_stage=3"], "zero_stage=3 is for engine=deepspeed, not engine=fsdp2: set"),
        ([*SINGLE, "parallel.replicate=2"], r"single is one process, not replicate \* shard = 2"),
        ([*zero(1, 2), "train.checkpoint.async=true"], "train.checkpoint.async needs parallel.engine single or fsdp2"),
        ([*zero(3, 2), "parallel.replicate=2"], r"replicate=2 is for engine=fsdp2 \(HSDP\): set replicate=1 shard=4"),
        ([*zero(1, 1), "parallel.zero_stage=4"], "zero_stage.*from 1 to 3"),
        (["parallel.engine=fsdp"], "did you mean fsdp2"),
        ([*fsdp2(3)], "16 rows.*not a multiple of train.micro_batch=4 rows on each of 3 processes"),
        ([*fsdp2(4), "train.micro_batch=8"], r"micro_batch=8 rows on each of 4 processes \(parallel.replicate \*"),
    ],
)
def test_combinations_that_no_world_can_train(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(folder, *overrides)


def test_deepspeed_is_not_installed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how to install it."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("slotmamba.dependencies.checkout_root", lambda: None)
    saved = recipe(folder)  # writes the file
    arguments = ["train", str(folder / "tiny.yaml"), f"run_dir={folder / saved.name}", *zero(2, 1)]
    assert fails(capsys, arguments, 1).endswith("is not installed: pip install 'slotmamba[deepspeed]'")


def test_a_launcher_that_sets_half_of_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = "not LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start the processes with torchrun"
    with pytest.raises(InputError, match=expected), joined("cpu"):
        pass


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 3, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    expected = "local rank 2 finds 2 GPUs: start at most 2 processes a machine"
    with pytest.raises(InputError, match=expected), joined("cuda"):
        pass
