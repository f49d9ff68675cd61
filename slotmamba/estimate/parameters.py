"""Parameters by part, counted on a model without memory behind it."""

from __future__ import annotations

import torch
from torch import nn

from slotmamba.config.schema import ModelConfig
from slotmamba.models import build_model
from slotmamba.models.attention import Attention
from slotmamba.models.bdlru import BDLRU
from slotmamba.models.injection import SlotInjection
from slotmamba.models.layers import SwiGLU
from slotmamba.models.mamba2 import BiMamba2
from slotmamba.models.slot_memory import SlotMemory

_PARTS: dict[type[nn.Module], str] = {
    BiMamba2: "Mamba-2",
    Attention: "attention",
    SwiGLU: "MLP",
    BDLRU: "BD-LRU",
    SlotMemory: "slot memory",
    SlotInjection: "injection",
}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Trainable numbers by part: embedding, encoder Mamba-2, encoder attention, encoder MLP, attention, BD-LRU, slot
    memory, injection, MLP, norms, output. A part that the model does not have is not there; tied, the output has none.

    The model is built on torch's meta device, so the count is exact and takes no memory.
    """
    with torch.device("meta"):
        model = build_model(config)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # a tied parameter comes once
        part = part_of(model, name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def part_of(model: nn.Module, name: str) -> str:
    """The part that a parameter belongs to: that of the innermost module around it that is one."""
    part, module = "norms", model
    for step in name.split(".")[:-1]:
        module = module.get_submodule(step)
        part = _PARTS.get(type(module), part)
    if part == "norms" and name in ("embedding.weight", "output.weight"):
        return name.removesuffix(".weight")
    return f"encoder {part}" if name.startswith("encoder.") and part != "norms" else part
