"""A model from a checkpoint, without the run around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slotmamba.checkpoint import state
from slotmamba.checkpoint.contents import check_digests
from slotmamba.checkpoint.group import Group
from slotmamba.checkpoint.manifest import (
    MANIFEST,
    claimed_steps,
    read_manifest,
    step_name,
    verify_files,
)
from slotmamba.checkpoint.newest import load_newest
from slotmamba.checkpoint.tensors import read_tensors, stored_tensors
from slotmamba.errors import InputError, one_line

if TYPE_CHECKING:
    from slotmamba.config.schema import ModelConfig


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the newest one of a checkpoints or a run folder.

    Raises:
        InputError: there is none.
    """
    if (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        steps = claimed_steps(folder)
        if steps:
            return folder / step_name(steps[-1])
    raise InputError(
        f"{path} has no checkpoint: expected a run folder, its `checkpoints`, or a folder in there with {MANIFEST}"
    )


def recipe_path(path: Path) -> Path:
    """recipe.yaml of the run that the checkpoint (as in `find_checkpoint`) belongs to.

    Raises:
        InputError: there is no checkpoint, or no recipe.yaml two folders above it.
    """
    checkpoint = find_checkpoint(path).resolve()
    recipe = checkpoint.parent.parent / "recipe.yaml"
    if not recipe.is_file():
        raise InputError(f"{recipe} is missing: expected the recipe of the run beside its checkpoints")
    return recipe


def load_model(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Build the model of a checkpoint and load its weights; in evaluation mode, parameters on ``device``.

    Args:
        path: A checkpoint; or a run folder or its ``checkpoints``, for the newest one in there that is not damaged,
            from which training would resume too. A warning names each damaged one that is skipped.

    Raises:
        InputError: there is no checkpoint, or this version builds another model from its configuration.
        DamagedCheckpointError: ``path`` is a checkpoint of which a file is missing or differs from what was written.
        SlotMambaError: all checkpoints of the run are damaged.
    """
    return open_checkpoint(path, device)[0]


def open_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, Path]:
    """`load_model`, and the folder of the checkpoint that it took."""
    newest = find_checkpoint(Path(path))
    if newest == Path(path):
        return _load(newest, device), newest
    folder = newest.parent
    found = load_newest(folder, lambda step: _load(folder / step_name(step), device))
    assert found is not None, "find_checkpoint has seen one"
    step, model = found
    return model, folder / step_name(step)


def _load(folder: Path, device: torch.device | str) -> nn.Module:
    from slotmamba.models import build_model

    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    # The initial weights, all replaced below, are not to take numbers from the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        model = build_model(_config(manifest.model, folder))
    tensors = state.model_tensors(model)
    state.check_model(tensors, stored_tensors(folder), folder)
    read_tensors(folder, tensors)
    written = {name: digest for name, digest in manifest.tensors.items() if name in tensors}
    check_digests(folder, tensors, written, Group())
    return model.to(device).eval()


def _config(section: dict[str, Any], folder: Path) -> ModelConfig:
    from pydantic import ValidationError

    from slotmamba.config.schema import ModelConfig

    try:
        return ModelConfig.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("model", *first["loc"])))
        raise InputError(f"{folder}: this version has no such model: {key}: {one_line(first['msg'])}") from error
