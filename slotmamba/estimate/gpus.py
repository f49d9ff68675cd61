"""Whether a process fits the GPU that the recipe's `slurm.gpu` names."""

from __future__ import annotations

import re

from slotmamba.config.schema import Recipe
from slotmamba.estimate import estimate

GIB = 2**30
MEMORY_GIB = {
    "v100": 16,
    "a10": 24,
    "a10g": 24,
    "a30": 24,
    "a40": 48,
    "a100": 80,
    "a100_40": 40,
    "l4": 24,
    "l40": 48,
    "l40s": 48,
    "h100": 80,
    "h200": 141,
    "gh200": 96,
    "b200": 180,
    "b300": 270,
}
"""Of each type of GPU, under the names that clusters give them; a name such as nvidia_a100_40gb says it itself."""
RESERVED_GIB = 2  # for CUDA and NCCL, and what is lost between allocations


def gpu_line(recipe: Recipe) -> str | None:
    """What a process needs of its GPU, beside what the type `slurm.gpu` has; None for a job without GPUs."""
    slurm = recipe.slurm
    if not slurm.gpus_per_node:
        return None
    needs = estimate(recipe).memory.training / GIB
    if slurm.gpu is None:
        return f"needs {needs:.1f} GiB of each GPU; slurm.gpu, its type, would tell whether that is there"
    has = memory_gib(slurm.gpu)
    if has is None:
        return f"needs {needs:.1f} GiB of each {slurm.gpu}, a type whose memory is not known here"
    if needs <= has - RESERVED_GIB:
        return f"needs {needs:.1f} GiB of the {has} GiB of each {slurm.gpu}"
    return (
        f"warning: needs {needs:.1f} GiB, and each {slurm.gpu} has {has} GiB, of which CUDA and NCCL take "
        f"{RESERVED_GIB}: {', '.join(_remedies(recipe))}"
    )


def memory_gib(gpu: str) -> int | None:
    """Memory of a type of GPU, or None where it is not known."""
    name = gpu.lower()
    said = re.search(r"(\d+)gb", name)
    if said:
        return int(said[1])
    known = [part for part in (name, *re.split(r"[^a-z0-9]", name)) if part in MEMORY_GIB]
    return MEMORY_GIB[known[0]] if known else None


def _remedies(recipe: Recipe) -> list[str]:
    train, parallel = recipe.train, recipe.parallel
    found = []
    if train.micro_batch > 1:
        found.append("lower train.micro_batch")
    if train.activation_checkpointing == "none":
        found.append("set train.activation_checkpointing=block")
    if parallel.replicate > 1:
        found.append("shard over more GPUs (parallel.shard)")
    elif parallel.engine == "deepspeed" and parallel.zero_stage < 3:
        found.append("raise parallel.zero_stage")
    return [*found, "take more GPUs"]
