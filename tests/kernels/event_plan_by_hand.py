"""The event plan, event by event in Python: what `slotmamba_kernels.hksa.event_plan` is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


class Stream:
    """One head of one sequence: walks through its tokens and keeps, for every slot, the code of its state."""

    def __init__(
        self, write_idx: Array, read_idx: Array, begins: Array, entering: Sequence[int], leaving: Sequence[int]
    ) -> None:
        """Slots [L, K] and [L, K'], first token of each token's document [L], and the slots of both memories' rows."""
        self.write_source = np.empty_like(write_idx)
        self.read_source = np.empty_like(read_idx)
        last_write: dict[int, int] = {}
        for t, begin in enumerate(begins):

            def state(slot: int, begin: int = begin) -> int:
                event = last_write.get(slot, -1)
                if event >= 0 and event // write_idx.shape[1] >= begin:
                    return event
                return -2 - entering.index(slot) if begin < 0 and slot in entering else -1

            for j, slot in enumerate(write_idx[t]):
                self.write_source[t, j] = state(int(slot))
            for j, slot in enumerate(write_idx[t]):
                last_write[int(slot)] = t * write_idx.shape[1] + j
            for j, slot in enumerate(read_idx[t]):
                self.read_source[t, j] = state(int(slot))

        # By position.
        self.write_order = np.argsort(write_idx.ravel(), kind="stable")
        self.read_order = np.argsort(read_idx.ravel(), kind="stable")
        self.previous = self.write_source.ravel()[self.write_order]
        alive = {e: slot for slot, e in last_write.items() if e // write_idx.shape[1] >= begins[-1]}
        left = {e: leaving.index(slot) for e, slot in alive.items() if slot in leaving}
        self.leaving = [left.get(int(e), -1) for e in self.write_order]
        positions: dict[int, list[int]] = {}
        for position, code in enumerate(self.read_source.ravel()[self.read_order]):
            positions.setdefault(int(code), []).append(position)
        self.readers = [positions.get(int(event), []) for event in self.write_order]


def streams_by_hand(
    write_idx: torch.Tensor,
    read_idx: torch.Tensor,
    num_slots: int,
    *,
    start: int = 0,
    length: int | None = None,
    doc_start: torch.Tensor | None = None,
    entering: str = "dense",
    entering_slots: torch.Tensor | None = None,
    leaving_slots: torch.Tensor | None = None,
) -> list[Stream]:
    """The arguments of `make_event_plan`; the streams in its order."""
    batch, tokens, heads, _ = write_idx.shape
    end = tokens if length is None else start + length
    every = range(num_slots)
    streams = []
    for b in range(batch):
        begins = np.full(end - start, -1) if doc_start is None else doc_start[b, start:end].cpu().numpy() - start
        for h in range(heads):
            rows = {"none": [], "dense": every}.get(entering)
            if entering_slots is not None:
                rows = entering_slots[b * heads + h].tolist()
            leaving = every if leaving_slots is None else leaving_slots[b * heads + h].tolist()
            writes, reads = (x[b, start:end, h].cpu().numpy() for x in (write_idx, read_idx))
            streams.append(Stream(writes, reads, begins, rows, leaving))
    return streams
