"""What of a slot memory goes through a stretch of tokens unwritten, and its gradient back.

A memory is dense (row m is slot m) or sparse: `slots` [B, H, R] ascending, padded with num_slots, names the slot of
each row and all other slots are as before any token. All functions work on the tensors of one stretch, without
autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slotmamba_kernels.hksa.slot_lists import rows_of, united
from slotmamba_kernels.hksa.state import SlotState


@dataclass(frozen=True)
class Memory:
    """A slot memory and, where it is sparse, the slots of its rows [B, H, R] int32."""

    state: SlotState
    slots: Tensor | None


def leaving_slots(last_writes: Tensor, entering: Tensor | None, continues: Tensor, num_slots: int) -> Tensor:
    """Slots [B, H, min(M, N + R)] of the memory after a stretch, ascending and padded with num_slots.

    last_writes: [S, N] ascending where not negative: the slot of each write whose state is left, -1 for others;
    entering: [B, H, R] or None; continues: bool [B], whether the document alive at the end entered with it.
    """
    batch = len(continues)
    kept = last_writes >= 0
    place = torch.where(kept, kept.cumsum(1) - 1, last_writes.shape[1])  # the others into a column cut off below
    written = last_writes.new_full((last_writes.shape[0], last_writes.shape[1] + 1), num_slots)
    written = written.scatter(1, place, last_writes.where(kept, num_slots))[:, :-1].unflatten(0, (batch, -1))
    if entering is None:
        return written[..., :num_slots].contiguous()
    return united(written, entering.where(continues.view(-1, 1, 1), num_slots), num_slots)


def leaving_rows(last_writes: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """`last_writes` [S, N] with each slot replaced by its row in `slots` [B, H, R], int32."""
    wanted = last_writes.unflatten(0, slots.shape[:2])
    rows = rows_of(slots, wanted.clamp(min=0), num_slots).where(wanted >= 0, -1)
    return rows.flatten(0, 1).to(torch.int32)


def carried(
    entering: Memory | None, continues: Tensor, slots: Tensor | None, like: Tensor, num_slots: int
) -> SlotState:
    """The memory after a stretch that writes nothing: `entering` where the document continues, else empty.

    slots: [B, H, R] of the memory after the stretch, None if dense. Fresh tensors; like: q [B, T, H, d].
    """
    batch, _, heads, dim = like.shape
    if entering is None:
        rows = num_slots if slots is None else slots.shape[-1]
        empty = SlotState.initial(batch, heads, rows, dim, device=like.device)
        return SlotState(empty.S_k, empty.S_v, torch.full_like(empty.z, 1.0 / num_slots), empty.surprise)
    return _moved(entering.state, _sources(entering.slots, slots, num_slots), continues, 1.0 / num_slots)


def carried_back(d_leaving: Memory, continues: Tensor, slots: Tensor | None, num_slots: int) -> SlotState:
    """Gradient of the entering memory (dense, or of these slots) of a stretch that writes nothing."""
    return _moved(d_leaving.state, _sources(d_leaving.slots, slots, num_slots), continues, 0.0)


def _sources(slots: Tensor | None, wanted: Tensor | None, num_slots: int) -> Tensor | None:
    """Row of a memory with `slots` for each row of one with the `wanted` slots, -1 for none; None if both are dense."""
    if slots is None or wanted is None:
        assert slots is wanted, "a memory stays dense or sparse within a call"
        return None
    return rows_of(slots, wanted, num_slots)


def _moved(state: SlotState, rows: Tensor | None, continues: Tensor, empty_z: float) -> SlotState:
    def move(x: Tensor, empty: float) -> Tensor:
        keep = continues.view(-1, *[1] * (x.ndim - 1))
        if rows is not None:
            index = rows.clamp(min=0)
            found = (rows >= 0) if x.ndim == 3 else (rows >= 0).unsqueeze(-1)
            index = index if x.ndim == 3 else index.unsqueeze(-1).expand(*index.shape, x.shape[-1])
            x, keep = x.gather(2, index), keep & found
        return x.where(keep, empty)

    return SlotState(move(state.S_k, 0.0), move(state.S_v, 0.0), move(state.z, empty_z), move(state.surprise, 0.0))
