"""docs/sizes.md says what `estimate` says, and its recipes can be started as they are."""

from __future__ import annotations

import pytest

from slotmamba.config import installed_recipes, load_recipe
from slotmamba.dry_run import dry_run
from slotmamba.estimate import estimate
from slotmamba.estimate.sizes import sizes_page
from slotmamba.installed import checkout_root

SHARDED = [name for name in installed_recipes() if load_recipe(name).parallel.size > 1]
SIZES = {"lm-130m": 130e6, "lm-340m": 340e6, "lm-1.3b": 1.3e9, "lm-7b": 7e9, "seq2seq-340m": 340e6}
GPU_BYTES = 79e9  # what an 80 GB card has for programs


def test_the_committed_page_is_up_to_date() -> None:
    root = checkout_root()
    assert root is not None
    committed = (root / "docs" / "sizes.md").read_text(encoding="utf-8")
    assert committed == sizes_page(), "docs/sizes.md is not what `estimate` says: run `make docs`"


def test_there_is_each_size_for_fsdp2_and_for_zero() -> None:
    engines = {(name.rpartition("-")[0], load_recipe(name).parallel.engine) for name in SHARDED}
    assert engines == {(size, engine) for size in SIZES for engine in ("fsdp2", "deepspeed")}


@pytest.mark.parametrize("name", SHARDED)
def test_is_as_large_as_its_name_and_fits_its_gpus(name: str) -> None:
    recipe = load_recipe(name)
    found = estimate(recipe)
    size = SIZES[name.rpartition("-")[0]]
    assert abs(found.total_parameters - size) / size < 0.03
    assert found.memory.training < GPU_BYTES
    assert recipe.parallel.size == recipe.slurm.nodes * recipe.slurm.gpus_per_node
    assert recipe.train.global_batch_tokens == recipe.rows_per_step * recipe.data.seq_len


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_can_be_built_for_all_its_processes(name: str) -> None:
    assert f"{name}: dry run of " in dry_run(load_recipe(name))
