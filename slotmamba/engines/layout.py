"""Whether a recipe fits the number of processes."""

from __future__ import annotations

from slotmamba.config.schema import Recipe
from slotmamba.errors import InputError


def check_layout(recipe: Recipe, size: int) -> None:
    """Checks that `size` processes can train the recipe.

    Raises:
        InputError: they cannot; says what to change.
    """
    parallel = recipe.parallel
    if parallel.engine == "single" and size > 1:
        raise InputError(
            f"parallel.engine=single trains in one process, but {size} were started: start one, or set "
            f"parallel.engine=fsdp2 parallel.shard={size}"
        )
    if parallel.size != size:
        raise InputError(
            f"the recipe asks for parallel.replicate * parallel.shard = {parallel.replicate} * {parallel.shard} = "
            f"{parallel.size} processes, but {size} {'was' if size == 1 else 'were'} started: start {parallel.size} "
            f"(torchrun --nproc-per-node), or set them to multiply to {size}"
        )
