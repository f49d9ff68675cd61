"""Long chains of writes, split into blocks that are walked side by side; `split_kernels.py` says how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from slotmamba_kernels.hksa.arrays import Inputs, Stretch
from slotmamba_kernels.hksa.event_plan import ceil_div
from slotmamba_kernels.hksa.split_kernels import STEPS, carry_blocks, choose_blocks, map_blocks

LEAST_WRITES = 192
"""A bucket of no more writes is never split: walking it once takes about as long as all that splitting needs."""

FULL_GPU = 4096
"""Chains that a GPU walks at once; writes are many if they keep it longer than that many of them would."""

BLOCKS_IN_ALL = 10240
"""Of a call, 17 KB each at d = 128."""


@dataclass(frozen=True)
class Split:
    """The blocks of a stretch, S streams, at most `capacity` of a stream; tensors as in `split_kernels.py`."""

    block_begin: Tensor
    long_buckets: Tensor
    block_range: Tensor
    step_of: Tensor
    weighted: Tensor
    decays: Tensor

    @property
    def capacity(self) -> int:
        return self.decays.shape[1]

    def carry(
        self, x: Inputs, at: Stretch, probe: Callable[[Split, tuple[Tensor, Tensor]], None], backward: bool
    ) -> tuple[Tensor, Tensor]:
        """States [S, capacity, 2, d] and normalisers [S, capacity], float32, from which each block begins, or with
        `backward` the adjoints that come to its end. `probe` fills the same with what blocks make of zeros."""
        _, length, heads, steps, _, _, dim = x.sizes
        streams, most = len(self.decays), self.long_buckets.shape[1] - 1
        sizes = (2, streams, self.capacity)
        constants, carried = torch.empty(*sizes, 2, dim, dtype=torch.float32, device=x.q.device).unbind(0)
        constants_z, carried_z = torch.empty(*sizes, dtype=torch.float32, device=x.q.device).unbind(0)
        probe(self, (constants, constants_z))
        carry_blocks[(most, streams, 2)](
            x.k, self.block_begin, self.long_buckets, self.step_of, self.weighted, self.decays,
            constants, constants_z, carried, carried_z,
            at.start, length, at.plan.num_buckets, self.capacity, most,
            H=heads, NS=steps, D=dim, BD=triton.next_power_of_2(dim), BACKWARD=backward, num_warps=4,
        )  # fmt: skip
        return carried, carried_z


def split_long_chains(x: Inputs, at: Stretch, log_keep: Tensor) -> Split | None:
    """Chooses on the GPU which buckets of a stretch are split.

    None where it is not worth asking: all are short, or there are so many streams that a slot which every token writes
    would not fit their share of the workspace. Chains with injection are not split: their maps mix the state with the
    normaliser.
    """
    batch, length, heads, steps, writes, _, dim = x.sizes
    streams, events, buckets = batch * heads, at.length * writes, at.plan.num_buckets
    least = max(LEAST_WRITES, events * streams // FULL_GPU)
    of_block = STEPS.value // steps
    most = events // (least + 1)  # buckets of more than `least` writes
    capacity = min(ceil_div(events, of_block) + most, BLOCKS_IN_ALL // streams)
    if events <= least or capacity * of_block < at.length or x.c_k is not None:
        return None

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(streams, *shape, dtype=dtype, device=x.q.device)

    split = Split(
        block_begin=empty(buckets + 1),
        long_buckets=empty(most + 1),
        block_range=empty(capacity, 2),
        step_of=empty(capacity, STEPS.value),
        weighted=empty(capacity, STEPS.value, triton.next_power_of_2(dim), dtype=torch.float32),
        decays=empty(capacity, dtype=torch.float32),
    )
    choose_blocks[(streams,)](
        at.plan.write_bucket, split.block_begin, split.long_buckets, buckets, capacity, most, least,
        BUCKETS=triton.next_power_of_2(buckets), WRITES=of_block,
        LEVELS=4 * (events // least).bit_length(), num_warps=4,  # 1.25^4 > 2
    )  # fmt: skip
    map_blocks[(capacity, streams)](
        x.k, x.beta, x.write_w, log_keep, x.gamma, at.plan.write_order, at.plan.previous, at.plan.write_bucket,
        split.block_begin, split.block_range, split.step_of, split.weighted, split.decays,
        at.start, length, at.length, buckets, capacity,
        H=heads, NS=steps, K=writes, D=dim, BD=triton.next_power_of_2(dim),
        WRITES=of_block, BITS=buckets.bit_length(), num_warps=1,
    )  # fmt: skip
    return split
