"""What a recipe leaves open about the processes of a job: the nodes that it asks for are filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slotmamba.config import recipe_content
from slotmamba.config.data import DataConfig
from slotmamba.config.schema import ParallelConfig, TrainConfig
from slotmamba.config.slurm import SlurmConfig
from slotmamba.errors import InputError
from slotmamba_slurm.resources import processes_per_node


@dataclass(frozen=True)
class Fill:
    """Keys of the recipe with the values that were found for them, and what for, in words."""

    settings: dict[str, Any]
    purpose: str

    @property
    def overrides(self) -> list[str]:
        """As `load_recipe` takes them."""
        return [f"{key}={value}" for key, value in self.settings.items()]

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)} ({self.purpose})"


def fill_nodes(recipe: str | Path, overrides: Sequence[str]) -> Fill | None:
    """Values of `parallel` and of `train.micro_batch` with which a recipe fills `slurm.nodes`.

    Each GPU, or where there are none each node, gets a process. A recipe that has as many processes already, on CPUs
    also a multiple of the nodes, keeps them. Of others the engine `single` becomes `fsdp2`; a `shard` of more than 1 is
    kept and `replicate` is the rest, else the processes of a node are a shard and each node is a replica; `deepspeed`
    shards over all. The micro-batch becomes the largest one, up to the recipe's, that divides the rows of a process.
    What `overrides` set, or a sweep tries, is not touched.

    Args:
        recipe: as `load_recipe`.
        overrides: as `load_recipe`; the user's.

    Returns:
        None where nothing is to be changed, or the recipe is wrong in itself: then `load_recipe` says why.

    Raises:
        RecipeError: the files or the overrides cannot be read.
        InputError: what is given does not fit the nodes, or the rows of a step do not spread evenly over them.
    """
    content = recipe_content(recipe, overrides)
    try:
        slurm = SlurmConfig.model_validate(content["slurm"])
        parallel = ParallelConfig.model_validate(content["parallel"])
        train = TrainConfig.model_validate(content.get("train"))
        data = DataConfig.model_validate(content.get("data"))
    except ValidationError:
        return None
    swept = content["sweep"] if isinstance(content["sweep"], dict) else ()  # else `load_recipe` says what is wrong
    given = [*(text.partition("=")[0] for text in overrides), *swept]
    layout = _layout(parallel, slurm, given)
    if layout is None:
        processes_per_node(parallel, slurm)  # says what does not fit
        raise AssertionError(f"{parallel} fills {slurm}")
    rows = train.global_batch_tokens // data.seq_len
    size = layout.get("replicate", parallel.replicate) * layout.get("shard", parallel.shard)
    settings = {f"parallel.{key}": value for key, value in layout.items() if value != getattr(parallel, key)}
    if settings and rows % size:
        raise InputError(
            f"a step has {rows} rows (train.global_batch_tokens / data.seq_len), which the {size} processes of "
            f"{_nodes(slurm)} cannot share evenly: set train.global_batch_tokens to a multiple of "
            f"{size * data.seq_len}, or other nodes"
        )
    if size > 1 and rows % size == 0 and not _is_given("train.micro_batch", given):
        most = _largest_divisor(rows // size, train.micro_batch)
        settings |= {"train.micro_batch": most} if most != train.micro_batch else {}
    return Fill(settings, f"to fill {_nodes(slurm)}") if settings else None


def _layout(parallel: ParallelConfig, slurm: SlurmConfig, given: Sequence[str]) -> dict[str, Any] | None:
    """Keys of `parallel` that fill the nodes; None where what is given stands in the way."""
    on_each = slurm.gpus_per_node or 1
    size = slurm.nodes * on_each
    if parallel.size == size or (not slurm.gpus_per_node and parallel.size % slurm.nodes == 0):
        return {}
    engine, replicate, shard = (_is_given(f"parallel.{key}", given) for key in ("engine", "replicate", "shard"))
    if parallel.engine == "deepspeed":
        return None if shard else {"shard": size}
    if parallel.engine == "single" and engine:
        return None
    if shard or parallel.shard > 1:
        fits = not replicate and size % parallel.shard == 0
        return {"engine": "fsdp2", "replicate": size // parallel.shard} if fits else None
    if replicate:
        fits = size % parallel.replicate == 0
        return {"engine": "fsdp2", "shard": size // parallel.replicate} if fits else None
    return {"engine": "fsdp2", "replicate": slurm.nodes, "shard": on_each}


def _is_given(key: str, given: Sequence[str]) -> bool:
    """Whether a key, or the section around it, is among these."""
    return any(key == each or key.startswith(f"{each}.") for each in given)


def _largest_divisor(number: int, most: int) -> int:
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)


def _nodes(slurm: SlurmConfig) -> str:
    nodes = f"{slurm.nodes} node{'s' if slurm.nodes > 1 else ''}"
    gpus = slurm.gpus_per_node
    return f"{nodes} of {gpus} GPU{'s' if gpus > 1 else ''}" if gpus else nodes
