"""The mix of two slot memories as torch operations, any float dtype: the definition (hksa.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.hksa.state import SlotState

SURPRISE_FLOOR = 1e-6


def thread_torch(own: SlotState, below: SlotState, bias: Tensor, slope: Tensor) -> SlotState:
    """See `slotmamba_kernels.thread_slots`; both memories are dense."""
    log_surprise = (own.surprise + SURPRISE_FLOOR).log()
    gate = (bias.view(1, -1, 1) + slope.view(1, -1, 1) * log_surprise).sigmoid()

    def mix(mine: Tensor, other: Tensor) -> Tensor:
        g = gate.unsqueeze(-1) if mine.ndim == 4 else gate
        return torch.lerp(other, mine, g.to(mine.dtype))

    return SlotState(
        mix(own.S_k, below.S_k), mix(own.S_v, below.S_v), mix(own.z, below.z), mix(own.surprise, below.surprise)
    )
