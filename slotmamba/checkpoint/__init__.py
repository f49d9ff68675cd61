"""Saving and loading runs: `CheckpointStore` for training, `load_model` for everything after."""

from slotmamba.checkpoint.contents import Contents, TensorContents
from slotmamba.checkpoint.group import Group
from slotmamba.checkpoint.manifest import DamagedCheckpointError
from slotmamba.checkpoint.model import find_checkpoint, load_model, open_checkpoint, recipe_path
from slotmamba.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "Contents",
    "DamagedCheckpointError",
    "Group",
    "TensorContents",
    "find_checkpoint",
    "load_model",
    "open_checkpoint",
    "recipe_path",
]
