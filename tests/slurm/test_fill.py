"""`submit` fills the nodes that are asked for with processes, and says with which values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slotmamba.cli import main
from slotmamba.config import load_recipe
from slotmamba.errors import InputError
from slotmamba_slurm.cluster import SlurmCluster
from slotmamba_slurm.fill import fill_nodes
from slotmamba_slurm.resources import processes_per_node
from tests.slurm.jobs import SMALL, cli, completed, succeeds
from tests.train.runs import records


def filled(*overrides: str) -> str | None:
    fill = fill_nodes("mqar-tiny", overrides)
    return None if fill is None else str(fill)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["slurm.nodes=2"], "parallel.engine=fsdp2 parallel.replicate=2 train.micro_batch=8 (to fill 2 nodes)"),
        (
            ["slurm.nodes=4", "slurm.gpus_per_node=2"],
            "parallel.engine=fsdp2 parallel.replicate=4 parallel.shard=2 train.micro_batch=2 "
            "(to fill 4 nodes of 2 GPUs)",
        ),
        (["slurm.gpus_per_node=1"], None),
        (
            ["slurm.gpus_per_node=1", "slurm.nodes=2", "train.micro_batch=1"],
            "parallel.engine=fsdp2 parallel.replicate=2 (to fill 2 nodes of 1 GPU)",
        ),
        # The largest divisor of 8 rows that is not above the recipe's micro-batch.
        (
            ["slurm={nodes: 2}", "train.global_batch_tokens=1536"],
            "parallel.engine=fsdp2 parallel.replicate=2 train.micro_batch=6 (to fill 2 nodes)",
        ),
        # Shards are kept.
        (
            ["slurm.nodes=4", "parallel.engine=fsdp2", "parallel.shard=2", "slurm.gpus_per_node=1"],
            "parallel.replicate=2 train.micro_batch=4 (to fill 4 nodes of 1 GPU)",
        ),
        (
            ["slurm.nodes=4", "parallel.engine=fsdp2", "parallel.shard=1"],
            "parallel.replicate=4 train.micro_batch=4 (to fill 4 nodes)",
        ),
        (
            ["slurm.nodes=4", "parallel.engine=fsdp2", "parallel.replicate=2"],
            "parallel.shard=2 train.micro_batch=4 (to fill 4 nodes)",
        ),
        (
            ["slurm.nodes=2", "slurm.gpus_per_node=2", "parallel.engine=deepspeed"],
            "parallel.shard=4 train.micro_batch=4 (to fill 2 nodes of 2 GPUs)",
        ),
        # On CPUs any number of processes that the nodes share.
        (["slurm.nodes=2", "parallel.engine=fsdp2", "parallel.shard=4"], "train.micro_batch=4 (to fill 2 nodes)"),
        (["slurm.nodes=2", "parallel.engine=fsdp2", "parallel.shard=4", "train.micro_batch=2"], None),
        (
            ["slurm.nodes=2", "sweep={optim.lr: [1.0e-3, 2.0e-3]}"],
            "parallel.engine=fsdp2 parallel.replicate=2 train.micro_batch=8 (to fill 2 nodes)",
        ),
        ([], None),
    ],
)
def test_what_is_found(overrides: list[str], said: str | None) -> None:
    assert filled(*overrides) == said
    fill = fill_nodes("mqar-tiny", overrides)
    recipe = load_recipe("mqar-tiny", [*overrides, *(fill.overrides if fill else [])])
    assert processes_per_node(recipe.parallel, recipe.slurm) * recipe.slurm.nodes == recipe.parallel.size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["slurm.nodes=2", "parallel.engine=single"], "slurm.nodes=2: parallel.replicate * parallel.shard = 1 "),
        (["slurm.nodes=2", "parallel={engine: single}"], "slurm.nodes=2: parallel.replicate * parallel.shard = 1 "),
        (["slurm.nodes=3", "parallel.engine=fsdp2", "parallel.shard=2"], "slurm.nodes=3: parallel.replicate * "),
        (["slurm.nodes=2", "parallel.shard=2"], "mqar-tiny.yaml with overrides: parallel: engine=single is one "),
        (["slurm.nodes=4", "train.micro_batch=16"], "mqar-tiny.yaml with overrides: a global batch has 16 rows "),
        (
            ["slurm.nodes=3"],
            "a step has 16 rows (train.global_batch_tokens / data.seq_len), which the 3 processes of 3 nodes cannot "
            "share evenly: set train.global_batch_tokens to a multiple of 384, or other nodes",
        ),
        (["slurm.nodes=two"], "override slurm.nodes=two: slurm.nodes: expected an integer at least 1, got 'two'"),
        (["train=3", "slurm.nodes=2"], "override train=3: "),
    ],
)
def test_what_the_user_sets_stands(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        fill = fill_nodes("mqar-tiny", overrides)
        load_recipe("mqar-tiny", [*overrides, *(fill.overrides if fill else [])])
    assert message in str(refused.value)


def test_a_large_model() -> None:
    """All that a user types for it."""
    fill = fill_nodes("lm-340m", ["slurm.nodes=4"])
    assert str(fill) == "parallel.engine=fsdp2 parallel.replicate=4 parallel.shard=8 (to fill 4 nodes of 8 GPUs)"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nodes_are_all_that_is_given(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Each node is a replica, and the losses are those of one process, to float32 sums in another order."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    eight = [*SMALL, "train.steps=8"]
    small = [text for text in eight if not text.startswith("train.micro_batch=")]
    out = succeeds(cli("submit", "mqar-tiny", f"run_dir={both}", *small, "slurm.nodes=2"))
    found = re.fullmatch(
        r"parallel\.engine=fsdp2 parallel\.replicate=2 train\.micro_batch=1 \(to fill 2 nodes\)\n"
        r"mqar-tiny: job (\d+) on 2 nodes: 2 processes\n.*",
        out,
        re.DOTALL,
    )
    assert found, out
    assert main(["train", "mqar-tiny", f"run_dir={alone}", *eight]) == 0
    completed(cluster, both, found[1])
    one, two = (records(folder, "train") for folder in (alone, both))
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], rel=1e-4)
    saved = load_recipe(both / "slurm" / "submission-001" / "recipe.yaml")
    assert (saved.parallel.engine, saved.parallel.replicate, saved.train.micro_batch) == ("fsdp2", 2, 1)


@pytest.mark.timeout(120)
def test_processes_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["cluster=local", "slurm.gpus_per_node=2", "--dry-run"]
    assert main(["submit", "mqar-tiny", f"run_dir={tmp_path}", *settings]) == 0
    out = capsys.readouterr().out
    assert out.startswith("parallel.engine=fsdp2 parallel.shard=2 train.micro_batch=8 (to fill 1 node of 2 GPUs)\n")
    assert out.endswith("cluster=local: 2 processes on this machine\n")
