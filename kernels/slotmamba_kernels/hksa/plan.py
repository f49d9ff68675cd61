"""Who writes and reads which slot when: the sort that turns a sequence into independent chains.

A *chain* is one slot of one document, head and sequence: the writes to it in time order. Chains never mix, so all of
them advance together, one write each at a time. Their states live in one table whose rows are ordered by step: first
the state that each chain starts from, then the states after every chain's first write, then after the second, and so
on. Chains are sorted by length, longest first, so the chains still alive at a step are the first rows of the step
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

CACHED_CHAINS = 1024


class Span(NamedTuple):
    """One write of a block of chains: table rows of the states before and after it, and its writes in table order."""

    before: slice
    after: slice
    event: slice


@dataclass(frozen=True)
class Schedule:
    """The order in which C chains advance. Plain numbers, so that autograd may keep it without keeping tensors alive.

    alive: chains that have a write of each step; alive[0] of them a first one. Falls from step to step.
    block: chains that advance together.
    """

    chains: int
    alive: list[int]
    block: int

    def spans(self) -> list[Span]:
        """A block of chains at a time, each from its first write to its last.

        On a CPU a block's states fit the cache, which is worth several times the speed of taking all chains through
        each step; a GPU takes all of them.
        """
        return [
            Span(
                slice(previous + low, previous + min(low + self.block, alive)),
                slice(start + low, start + min(low + self.block, alive)),
                slice(start - self.chains + low, start - self.chains + min(low + self.block, alive)),
            )
            for low in range(0, self.chains, self.block)
            for previous, start, alive in self._steps
            if low < alive
        ]

    @cached_property
    def _steps(self) -> list[tuple[int, int, int]]:
        """(first table row of the step before, first table row of the step, chains alive) for each step."""
        steps, previous, start = [], 0, self.chains
        for alive in self.alive:
            steps.append((previous, start, alive))
            previous, start = start, start + alive
        return steps


@dataclass(frozen=True)
class Plan:
    """C chains, E writes, R = B*T*H token rows, P = C + E rows of the state table.

    schedule: the order in which the chains advance.
    memory_row: [C] row of the flattened entering memory [B*H*M] that the chain's slot is.
    continues: [C] whether the chain's document began before the call, so that it starts from the entering memory.
    event: [E] the write (token row * K + k) of table row C + i.
    token: [E] its token row.
    write_row: [R, K] table row of the state after each write.
    read_row: [R, K'] table row of the state that each read sees.
    ends: [F] chains whose documents are alive at the call's end, end_row: [F] table row of their last state.
    row_continues: [B] whether the document alive at the end began before the call.
    """

    schedule: Schedule
    memory_row: Tensor
    continues: Tensor
    event: Tensor
    token: Tensor
    write_row: Tensor
    read_row: Tensor
    ends: Tensor
    end_row: Tensor
    row_continues: Tensor

    @property
    def chains(self) -> int:
        return self.schedule.chains


@torch.no_grad()
def make_plan(write_idx: Tensor, read_idx: Tensor, num_slots: int, doc_start: Tensor | None) -> Plan:
    """Sorts the writes [B, T, H, K] and reads [B, T, H, K'] of a call by chain and time."""
    batch, length, heads, writes = write_idx.shape
    device = write_idx.device
    document = _document_numbers(doc_start, batch, length, device)
    documents = int(document.max()) + 1
    stream = torch.arange(batch * heads, device=device).view(batch, 1, heads)
    first_slot = (stream * documents + document.unsqueeze(-1)) * num_slots  # [B, T, H]
    time = torch.arange(length, device=device).view(1, -1, 1)

    def order_key(index: Tensor, is_read: int) -> Tensor:
        """One integer an event: chain, then time, then write before read."""
        return (((first_slot.unsqueeze(-1) + index) * length + time.unsqueeze(-1)) * 2 + is_read).flatten()

    events = torch.cat([order_key(write_idx, 0), order_key(read_idx, 1)])
    ordered, order = events.sort()
    is_write = (ordered & 1) == 0
    key = ordered // (2 * length)
    starts = torch.ones_like(is_write)
    starts[1:] = key[1:] != key[:-1]
    chain = starts.cumsum(0) - 1
    key = key[starts]

    # Writes of the chain up to and with each event: 0 is "none yet", the state the chain starts from.
    written = is_write.cumsum(0)
    before = (written - is_write.long())[starts]
    step = written - before[chain]
    last = torch.cat([starts[1:], starts.new_ones(1)])
    lengths = step[last]

    by_length = lengths.argsort(descending=True, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(by_length), device=device)
    # Chains that have at least s writes, for s = 0, 1, ...: the block sizes of the table.
    blocks = lengths.bincount().flip(0).cumsum(0).flip(0)
    block_start = blocks.cumsum(0) - blocks
    row = torch.empty_like(order)
    row[order] = block_start[step] + rank[chain]

    count = write_idx.numel()
    chains = len(key)
    write_row = row[:count]
    event = torch.empty(count, dtype=torch.long, device=device)
    event[write_row - chains] = torch.arange(count, device=device)

    key, lengths = key[by_length], lengths[by_length]
    slot = key % num_slots
    stream_of = key // (num_slots * documents)
    document_of = key // num_slots % documents
    ends = (document_of == document[:, -1].repeat_interleave(heads)[stream_of]).nonzero().squeeze(-1)
    return Plan(
        schedule=Schedule(chains, blocks[1:].tolist(), CACHED_CHAINS if device.type == "cpu" else chains),
        memory_row=stream_of * num_slots + slot,
        continues=document_of == 0,
        event=event,
        token=event // writes,
        write_row=write_row.view(-1, writes),
        read_row=row[count:].view(-1, read_idx.shape[-1]),
        ends=ends,
        end_row=block_start[lengths[ends]] + ends,
        row_continues=document[:, -1] == 0,
    )


def _document_numbers(doc_start: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B, T]: 0 for a document that began before the call, then 1, 2, ... in the order of their starts."""
    if doc_start is None:
        return torch.zeros(batch, length, dtype=torch.long, device=device)
    return (doc_start == torch.arange(length, device=device)).cumsum(1)
