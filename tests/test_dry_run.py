"""Dry runs at 64 processes, against the estimate and against real shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slotmamba.cli import main
from slotmamba.config import Recipe, load_recipe
from slotmamba.dry_run import _part
from slotmamba.estimate import estimate
from slotmamba.estimate.sharding import FLOAT, shares
from slotmamba.models.units import weight_units

pytestmark = pytest.mark.timeout(120)

SIZE = ["train.global_batch_tokens=1048576"]
FSDP = [*SIZE, "parallel.engine=fsdp2", "parallel.shard=64"]
HSDP = [*SIZE, "parallel.engine=fsdp2", "parallel.shard=8", "parallel.replicate=8"]
ZERO = [*SIZE, "parallel.engine=deepspeed", "parallel.shard=64"]

MILLION = ["train.global_batch_tokens=1073741824", "train.micro_batch=1", "optim.warmup=0"]


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("lm-50m", list(overrides))


@pytest.mark.parametrize(
    ("overrides", "engine"),
    [
        (FSDP, "fsdp2 on 64 processes"),
        (HSDP, "fsdp2 on 64 processes with 8 replicas (HSDP)"),
        ([*ZERO, "parallel.zero_stage=3"], "deepspeed ZeRO-3 on 64 processes"),
        ([*HSDP, "parallel.cpu_offload=true"], "fsdp2 on 64 processes with 8 replicas (HSDP)"),
        ([], "one process"),
    ],
)
def test_reports(overrides: list[str], engine: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if "deepspeed" in engine:
        pytest.importorskip("deepspeed")
    run_dir = tmp_path / "run"
    assert main(["train", "lm-50m", "--dry-run", f"run_dir={run_dir}", *overrides]) == 0
    out = capsys.readouterr().out
    assert f"lm-50m: dry run of {engine}; nothing is trained\n" in out
    assert not run_dir.exists()
    assert not torch.distributed.is_initialized()
    for line in out.splitlines():  # what was built and what was estimated
        if line.startswith(("parameters  ", "gradients  ", "optimizer states  ", "offloaded")) and "iB" in line:
            built, built_unit, estimated, estimated_unit = line.split()[-4:]
            assert built_unit == estimated_unit
            assert float(built) == pytest.approx(float(estimated), rel=0.01), line


@pytest.mark.slow
def test_the_largest_world(capsys: pytest.CaptureFixture[str]) -> None:
    world = ["parallel.engine=fsdp2", "parallel.replicate=8192", "parallel.shard=8"]
    assert main(["train", "lm-50m", "--dry-run", *MILLION, *world]) == 0
    assert "dry run of fsdp2 on 65536 processes with 8192 replicas" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [FSDP, HSDP])
def test_shards_of_fsdp_against_the_estimate(overrides: list[str]) -> None:
    """Exactly: the first process has the largest shards."""
    recipe = recipe_of(*overrides)
    first, last = _part(recipe, 0), _part(recipe, 63)
    memory = estimate(recipe).memory
    assert FLOAT * first.parameters == memory.parameters == memory.gradients
    assert FLOAT * first.optimizer == memory.optimizer
    assert last.parameters <= first.parameters


def test_all_shards_of_a_replica_are_the_model() -> None:
    recipe = recipe_of(*HSDP)
    assert sum(_part(recipe, rank).parameters for rank in range(8, 16)) == estimate(recipe).total_parameters


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shares_of_zero_against_the_estimate(stage: int) -> None:
    """Within a thousandth: the estimate does not round every parameter's share up."""
    pytest.importorskip("deepspeed")
    recipe = recipe_of(*ZERO, f"parallel.zero_stage={stage}")
    part, memory = _part(recipe, 0), estimate(recipe).memory
    assert FLOAT * part.parameters == pytest.approx(memory.parameters, rel=1e-3)
    assert FLOAT * part.gradients == pytest.approx(memory.gradients, rel=1e-3)
    assert FLOAT * part.optimizer == pytest.approx(memory.optimizer, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zeros_buckets_hold_a_layer(stage: int) -> None:
    """Two of them; stage 3 gathers the whole of this model beside them."""
    recipe = recipe_of(*ZERO, f"parallel.zero_stage={stage}", "model.vocab_size=1000")
    units = weight_units(recipe.model)
    layer = max(sum(torch.Size(shape).numel() for shape in shapes) for shapes in units.values())
    live = estimate(recipe).total_parameters if stage == 3 else 0
    assert units[""][0] == (1000, 512) and layer > 1000 * 512
    assert estimate(recipe).memory.gathered == FLOAT * (2 * layer + live)


def test_what_is_sent() -> None:
    """Over 4 processes, 2 passes a step; FSDP pads its shards."""
    settings = ["parallel.shard=4", "train.global_batch_tokens=131072", "train.micro_batch=16"]
    units = weight_units(recipe_of().model)
    sizes = {name: FLOAT * sum(torch.Size(shape).numel() for shape in shapes) for name, shapes in units.items()}
    root, whole = sizes[""], sum(sizes.values())

    def sent(*engine: str) -> list[float]:
        return list(shares(recipe_of(*settings, *engine), units).communication.values())

    ring = 3 / 4
    assert sent("parallel.engine=fsdp2") == pytest.approx([ring * 2 * (2 * whole - root), ring * whole], rel=1e-5)
    zero = "parallel.engine=deepspeed"
    assert sent(zero, "parallel.zero_stage=1") == [ring * whole, ring * whole]
    assert sent(zero, "parallel.zero_stage=2") == [ring * whole, 2 * ring * whole]
    assert sent(zero, "parallel.zero_stage=3") == [4 * ring * whole, 2 * ring * whole]
    assert shares(recipe_of(), units).communication == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.engine=fsdp2", "parallel.shard=48"], "not a multiple of train.micro_batch=16 rows on each of 48"),
        ([*ZERO, "parallel.replicate=2"], "ZeRO shards over all processes"),
        (["parallel.shard=64"], "engine=single is one process"),
        (
            [*MILLION, "parallel.engine=fsdp2", "parallel.replicate=131072", "parallel.shard=8"],
            "a dry run is for at most 65536 processes, not parallel.replicate * parallel.shard = 1048576",
        ),
        ([*MILLION, "parallel.engine=deepspeed", "parallel.shard=1048576"], "a dry run is for at most 65536 processes"),
        (
            [*MILLION, "parallel.engine=fsdp2", "parallel.replicate=8", "parallel.shard=8192"],
            "a dry run of fsdp2 is for at most 4096 shards, not parallel.shard=8192",
        ),
        ([*FSDP, "model.n_heads=7"], "d_model=512 is not divisible by n_heads=7"),
    ],
)
def test_bad_recipes(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "lm-50m", "--dry-run", *overrides]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
