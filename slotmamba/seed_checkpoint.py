"""A checkpoint of step 0: the initial weights, for any engine on any number of processes to start from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from slotmamba.checkpoint import CheckpointStore, TensorContents
from slotmamba.config.schema import Recipe
from slotmamba.errors import InputError
from slotmamba.models import build_model
from slotmamba.models.initial import InitialWeights
from slotmamba.optim import build_optimizer, decayed_parameters
from slotmamba.run_folder import locked
from slotmamba.world import World


def write_seed_checkpoint(recipe: Recipe) -> Path:
    """Writes the recipe's initial weights into its run folder, in this one process and its CPU's memory.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: there are checkpoints in the run folder, a process trains there, or several processes were started.
        OSError: it could not be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--seed-checkpoint is for one process: start it without torchrun")
    with locked(recipe.run_path, World.alone(torch.device("cpu"))):
        store = CheckpointStore(recipe.run_path, recipe.train.checkpoint.keep, recipe.model.model_dump(mode="json"))
        if store.committed():
            raise InputError(f"{store.folder.path} has checkpoints already: a run starts from the newest of them")
        model = build_model(recipe.model)
        InitialWeights(model, recipe.seed).fill(model)
        optimizer = build_optimizer(model, recipe.optim, decayed_parameters(model))
        # No place in the data: a run that starts from it starts at its first row.
        return store.save(0, TensorContents(model, optimizer), {"seed": recipe.seed})


def check_seed(progress: Mapping[str, Any], recipe: Recipe, checkpoint: Path) -> None:
    """Checks that a seed checkpoint, of this progress, holds the weights that the recipe's seed stands for.

    Raises:
        InputError: it was written with another seed; the run would be that of neither.
    """
    if progress["seed"] != recipe.seed:
        raise InputError(
            f"{checkpoint} holds the initial weights of seed={progress['seed']}, and the recipe has "
            f"seed={recipe.seed}: set seed={progress['seed']}, or write it anew in another run_dir"
        )
