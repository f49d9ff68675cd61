"""Threading the slot memory through the layers (hksa.md section 4)."""

from __future__ import annotations

import torch
from torch import nn

from slotmamba.models.initial import constant, starts
from slotmamba_kernels import SlotState, thread_slots

OWN_SHARE = 0.9


class SurpriseGate(nn.Module):
    """Mixes a layer's memory with that of the layer below: g * own + (1 - g) * below, slot by slot.

    g = sigmoid(b + c * log(surprise + 1e-6)), with the layer's own surprise and learned b and c for each head. Both
    memories end before the segment that starts from the mix, so nothing comes from the future; the mix is convex, so
    the bound on |S| / z survives. Starts at g = 0.9 everywhere.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.bias = starts(nn.Parameter(torch.empty(heads)), lambda bias, _: bias.fill_(OWN_SHARE).logit_())
        self.slope = starts(nn.Parameter(torch.empty(heads)), constant(0.0))

    def forward(self, own: SlotState, below: SlotState) -> SlotState:
        """Memories of the document alive at the end of a segment -> the memory that the next segment starts from."""
        return thread_slots(own, below, self.bias, self.slope)
