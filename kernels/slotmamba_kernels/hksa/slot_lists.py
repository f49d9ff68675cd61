"""Lists of slots: which ones a sparse memory holds. [B, H, R] int32, ascending, filled up with num_slots."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 16  # so that lengths repeat, and the kernels that the compiler makes for multiples of 16


def united(first: Tensor, second: Tensor, num_slots: int) -> Tensor:
    """The slots of either list, [B, H, min(M, R + R')]. Neither need be ascending or free of repetitions."""
    both = torch.cat([first, second], -1).sort(-1).values
    repeated = torch.zeros_like(both, dtype=torch.bool)
    repeated[..., 1:] = both[..., 1:] == both[..., :-1]
    return both.where(~repeated, num_slots).sort(-1).values[..., :num_slots].contiguous()


def trimmed(slots: Tensor, num_slots: int) -> Tensor:
    """The list without columns that only fill it up, but for those up to a multiple of COLUMNS. Waits for the GPU."""
    count = max(int((slots < num_slots).sum(-1).max()), 1)
    return slots[..., : -(-count // COLUMNS) * COLUMNS].contiguous()


def rows_of(slots: Tensor, wanted: Tensor, num_slots: int) -> Tensor:
    """Place of each wanted slot [B, H, N] in the list [B, H, R], -1 where it is not there (or is num_slots)."""
    row = torch.searchsorted(slots, wanted).clamp(max=slots.shape[-1] - 1)
    return row.where((slots.gather(-1, row) == wanted) & (wanted < num_slots), -1)
