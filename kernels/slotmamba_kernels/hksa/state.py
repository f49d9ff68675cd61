"""The slot memory that one call leaves to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotState:
    """Slot memory of one layer, float32 (float64 where the inputs are float64).

    S_k, S_v: [B, H, M, d] key and value sums; z: [B, H, M] their normaliser; surprise: [B, H, M].
    """

    S_k: Tensor
    S_v: Tensor
    z: Tensor
    surprise: Tensor

    @classmethod
    def initial(
        cls,
        batch: int,
        heads: int,
        num_slots: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SlotState:
        """The memory before any token: sums and surprise 0, normaliser 1/M."""
        zeros = torch.zeros(batch, heads, num_slots, dim, device=device, dtype=dtype)
        flat = torch.zeros(batch, heads, num_slots, device=device, dtype=dtype)
        return cls(zeros, torch.zeros_like(zeros), torch.full_like(flat, 1.0 / num_slots), flat)

    def map(self, function: Callable[[Tensor], Tensor]) -> SlotState:
        """The state with `function` applied to each of its tensors."""
        return SlotState(function(self.S_k), function(self.S_v), function(self.z), function(self.surprise))


@dataclass(frozen=True)
class SparseSlotState(SlotState):
    """Slot memory that holds only some slots: all others are as before any token.

    Row r of S_k, S_v [B, H, R, d] and of z, surprise [B, H, R] is slot `slots[b, h, r]`. slots: [B, H, R] int32,
    ascending, padded with num_slots; rows of padding mean nothing.
    """

    slots: Tensor
    num_slots: int
