"""A process beside the memory of the GPU that the recipe names."""

from __future__ import annotations

import pytest

from slotmamba.config import load_recipe
from slotmamba.estimate import estimate
from slotmamba.estimate.gpus import gpu_line, memory_gib

GPU = ["slurm.gpus_per_node=1"]


def test_what_a_process_needs() -> None:
    recipe = load_recipe("lm-340m", [*GPU, "slurm.gpu=h100", "train.micro_batch=2"])
    needs = f"{estimate(recipe).memory.training / 2**30:.1f}"
    assert gpu_line(recipe) == f"needs {needs} GiB of the 80 GiB of each h100"
    assert gpu_line(load_recipe("mqar-tiny")) is None


def test_what_does_not_fit() -> None:
    line = gpu_line(load_recipe("lm-340m", [*GPU, "slurm.gpu=l4", "train.micro_batch=32"]))
    assert line is not None and line.startswith("warning: needs ")
    assert line.endswith(
        " GiB, and each l4 has 24 GiB, of which CUDA and NCCL take 2: lower train.micro_batch, "
        "set train.activation_checkpointing=block, take more GPUs"
    )


def test_what_is_not_known() -> None:
    line = gpu_line(load_recipe("mqar-tiny", [*GPU, "slurm.gpu=mi300x"]))
    assert line is not None and line.endswith(" GiB of each mi300x, a type whose memory is not known here")
    line = gpu_line(load_recipe("mqar-tiny", GPU))
    assert line is not None and line.endswith("slurm.gpu, its type, would tell whether that is there")


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("h100", 80),
        ("H200", 141),
        ("a100_40", 40),
        ("nvidia_a100_3g.20gb", 20),
        ("nvidia_h100_80gb_hbm3", 80),
        ("tesla-v100", 16),
        ("mi300x", None),
    ],
)
def test_names_of_clusters(name: str, memory: int | None) -> None:
    assert memory_gib(name) == memory
