"""SlotMamba: language models whose layers carry a recurrent slot memory.

The names below load on first use, so that ``import slotmamba`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slotmamba.checkpoint import load_model as load
    from slotmamba.config.schema import ModelConfig as SlotMambaConfig
    from slotmamba.models.slotmamba import SlotMambaForCausalLM, SlotMambaForSeq2Seq

    __version__: str

__all__ = ["SlotMambaConfig", "SlotMambaForCausalLM", "SlotMambaForSeq2Seq", "__version__", "load"]

_EXPORTS = {
    "load": ("slotmamba.checkpoint", "load_model"),
    "SlotMambaConfig": ("slotmamba.config.schema", "ModelConfig"),
    "SlotMambaForCausalLM": ("slotmamba.models.slotmamba", "SlotMambaForCausalLM"),
    "SlotMambaForSeq2Seq": ("slotmamba.models.slotmamba", "SlotMambaForSeq2Seq"),
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("slotmamba")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'slotmamba' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
