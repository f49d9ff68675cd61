"""Saving and loading runs: `CheckpointStore` for training, `load_model` for everything after."""

from slotmamba.checkpoint.manifest import DamagedCheckpointError
from slotmamba.checkpoint.model import find_checkpoint, load_model, open_checkpoint, recipe_path
from slotmamba.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "DamagedCheckpointError",
    "find_checkpoint",
    "load_model",
    "open_checkpoint",
    "recipe_path",
]
