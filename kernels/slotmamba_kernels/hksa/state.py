"""The slot memory that one call leaves to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba_kernels.hksa.slot_lists import rows_of

DENSE_SLOTS = 4096
"""On the Triton backend heads with more slots leave a sparse memory, unless they were given a dense one."""

MAX_OFFSET = 2**31 - 1
"""Of the kernels' offsets within a stream and a stretch of tokens."""

MOST_BUCKETS = 1024
"""Of an event plan, in which heads with at most so many slots can have one for each of them."""


@dataclass(frozen=True)
class SlotState:
    """Slot memory of one layer, float32 (float64 where the inputs are float64).

    S_k, S_v: [B, H, M, d] key and value sums; z: [B, H, M] their normaliser; surprise: [B, H, M].

    What `hksa` and `thread_slots` return may hold fewer rows than there are slots (`SparseSlotState`). They take either
    kind; whoever wants to look at the rows themselves takes those of `dense()`.
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
        """The memory before any token: sums and surprise 0, normaliser 1/M. M rows; `state=None` of `hksa` is none."""
        zeros = torch.zeros(batch, heads, num_slots, dim, device=device, dtype=dtype)
        flat = torch.zeros(batch, heads, num_slots, device=device, dtype=dtype)
        return SlotState(zeros, torch.zeros_like(zeros), torch.full_like(flat, 1.0 / num_slots), flat)

    @property
    def num_slots(self) -> int:
        """Slots of a head, M."""
        return self.z.shape[-1]

    def map(self, function: Callable[[Tensor], Tensor]) -> SlotState:
        """The state with `function`, which keeps shapes, applied to S_k, S_v, z and surprise."""
        parts = {name: function(getattr(self, name)) for name in ("S_k", "S_v", "z", "surprise")}
        return replace(self, **parts)

    def dense(self) -> SlotState:
        """The same memory with a row for every slot. Differentiable."""
        return self

    def contents(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What slots hold: S_k / z and S_v / z of the slots index [B, T, H, K] (integers), both [B, T, H, K, d].

        Differentiable; gradients of a slot are added up in the same order every time.
        """
        return self._contents_of_rows(index)

    def _contents_of_rows(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Contents at rows [B, T, H, K] of each head's memory, 0 where the row is -1."""
        batch, heads, rows, dim = self.S_k.shape
        streams = torch.arange(batch * heads, device=row.device).view(batch, 1, heads, 1)
        at = streams * rows + row.clamp(min=0)
        found = (row >= 0).unsqueeze(-1)
        # Not by indexing, whose backward pass on a GPU adds up by atomics.
        z = F.embedding(at, self.z.reshape(-1, 1)).where(found, 1.0)
        held_k = F.embedding(at, self.S_k.reshape(-1, dim)).where(found, 0.0)
        held_v = F.embedding(at, self.S_v.reshape(-1, dim)).where(found, 0.0)
        return held_k / z, held_v / z


@dataclass(frozen=True)
class SparseSlotState(SlotState):
    """Slot memory that holds only some slots: all others are as before any token.

    Row r of S_k, S_v [B, H, R, d] and of z, surprise [B, H, R] is slot `slots[b, h, r]`. slots: [B, H, R] int32,
    ascending, filled up with slots_in_all, the number of slots of a head; rows of that filling mean nothing.
    """

    slots: Tensor
    slots_in_all: int

    @property
    def num_slots(self) -> int:
        return self.slots_in_all

    def dense(self) -> SlotState:
        index = self.slots.long()

        def scattered(x: Tensor, empty: float) -> Tensor:
            # Fillings go into one more row, which is cut off.
            all_slots = x.new_full((*x.shape[:2], self.slots_in_all + 1, *x.shape[3:]), empty)
            place = index if x.ndim == 3 else index.unsqueeze(-1).expand_as(x)
            return all_slots.scatter(2, place, x)[:, :, :-1]

        return SlotState(
            scattered(self.S_k, 0.0),
            scattered(self.S_v, 0.0),
            scattered(self.z, 1.0 / self.slots_in_all),
            scattered(self.surprise, 0.0),
        )

    def contents(self, index: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, heads, active = index.shape
        wanted = index.to(self.slots.dtype).transpose(1, 2).flatten(2).contiguous()
        row = rows_of(self.slots, wanted, self.slots_in_all)
        return self._contents_of_rows(row.view(batch, heads, length, active).transpose(1, 2))
