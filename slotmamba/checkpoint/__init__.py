"""Saving and loading runs: `CheckpointStore` for training, `load_model` for everything after.

The names below load when they are first used: who only reads manifests needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slotmamba.checkpoint.contents import Contents, TensorContents
    from slotmamba.checkpoint.group import Group
    from slotmamba.checkpoint.manifest import DamagedCheckpointError
    from slotmamba.checkpoint.model import find_checkpoint, load_model, open_checkpoint, recipe_path
    from slotmamba.checkpoint.store import CheckpointStore

_MODULE_OF = {
    "CheckpointStore": "store",
    "Contents": "contents",
    "DamagedCheckpointError": "manifest",
    "Group": "group",
    "TensorContents": "contents",
    "find_checkpoint": "model",
    "load_model": "model",
    "open_checkpoint": "model",
    "recipe_path": "model",
}

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


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
