"""A checkpoint of step 0: the initial weights, for any engine on any number of processes to start from."""

from __future__ import annotations

import os
from pathlib import Path

from slotmamba.checkpoint import CheckpointStore, TensorContents
from slotmamba.config.schema import Recipe
from slotmamba.errors import InputError
from slotmamba.models import build_model
from slotmamba.models.initial import InitialWeights
from slotmamba.optim import build_optimizer, decayed_parameters


def write_seed_checkpoint(recipe: Recipe) -> Path:
    """Writes the recipe's initial weights into its run folder, in this one process and its CPU's memory.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: there are checkpoints in the run folder, or several processes were started.
        OSError: it could not be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--seed-checkpoint is for one process: start it without torchrun")
    store = CheckpointStore(recipe.run_path, recipe.train.checkpoint.keep, recipe.model.model_dump(mode="json"))
    if store.committed():
        raise InputError(f"{store.folder.path} has checkpoints already: a run starts from the newest of them")
    model = build_model(recipe.model)
    InitialWeights(model, recipe.seed).fill(model)
    optimizer = build_optimizer(model, recipe.optim, decayed_parameters(model))
    recipe.run_path.mkdir(parents=True, exist_ok=True)
    # No progress: a run that starts from it starts at its first row.
    return store.save(0, TensorContents(model, optimizer), {})
