"""The parts of a model whose weights are gathered, and whose gradients are reduced, together."""

from __future__ import annotations

import re

import torch

from slotmamba.config.schema import ModelConfig
from slotmamba.models.slotmamba import build_model

Shape = tuple[int, ...]


def weight_units(config: ModelConfig) -> dict[str, list[Shape]]:
    """Shapes of the parameters by what is gathered together: each layer under its name, all else under ""."""
    with torch.device("meta"):
        model = build_model(config)
    units: dict[str, list[Shape]] = {"": []}
    for name, parameter in model.named_parameters():
        layer = re.match(r"(encoder|decoder)\.layers\.\d+(?=\.)", name)
        units.setdefault(layer[0] if layer else "", []).append(tuple(parameter.shape))
    return units
