"""BD-LRU on Triton kernels, as ops that autograd, autocast, torch.compile and activation checkpointing see.

Where the batch has enough rows of blocks to keep a GPU busy, one walk through the tokens does it all and reads the
gates once. Else the sequence is cut into chunks as in vectorized.py: the affine maps of all chunks; the state carried
from chunk to chunk, the same recurrence with the maps as gates; the walk through all chunks side by side. Backward the
same, from the other end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slotmamba_kernels.bdlru.triton_kernels import LANES, compose_chunks, scan_chunks, scan_chunks_backward
from slotmamba_kernels.custom_op import custom_op

# By block size: programs, of 32 rows each, from which one walk is faster than two that share the tokens among chunks.
# Small blocks have little to read twice, and walk alone only where chunks would be as long as half the sequence.
WALKS = {1: 1024, 2: 1024, 4: 1024, 8: 128, 16: 64}
PROGRAMS = 2048  # about, when there are chunks: 16 warps for each multiprocessor of an H100
SHORTEST_CHUNK = 64
# By block size: how many tokens ahead of their use the gates are loaded. That is as long as memory takes to answer.
AHEAD = {1: 8, 2: 8, 4: 8, 8: 6, 16: 4}
AHEAD_BACKWARD = {1: 4, 2: 4, 4: 4, 8: 2, 16: 2}
AHEAD_COMPOSING = {1: 4, 2: 4, 4: 4, 8: 2, 16: 2}  # and carrying


def chunk_length(batch: int, length: int, width: int, m: int) -> int:
    """Tokens of a chunk; `length` where one walk through all of them is best."""
    programs = batch * -(-width // LANES.value)
    if programs >= WALKS[m]:
        return length
    chunk = max(-(-length * programs // PROGRAMS), SHORTEST_CHUNK)
    return length if length < 2 * chunk else chunk


def bdlru_triton(v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.bdlru`; the arguments are checked, v and gates as the caller gave them, state float32."""
    return bdlru_forward(v, gates, state, doc_start)


@custom_op("slotmamba::bdlru")
def bdlru_forward(v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """h [B, T, D] in v's dtype and the leaving state [B, D] float32."""
    v, gates, state = v.contiguous(), gates.contiguous(), state.contiguous()
    doc_start = None if doc_start is None else doc_start.contiguous()
    batch, length, width = v.shape
    m = gates.shape[3]
    h, leaving = torch.empty_like(v), torch.empty_like(state)
    chunk, chunks, grid = _grid(batch, length, width, m)
    carried = None
    if chunks > 1:
        carried = _carry(v, gates, doc_start, state, chunk, chunks, backward=False)
    scan_chunks[grid](
        v, gates, doc_start, state, carried, h, leaving, length, chunk, chunks,
        WIDTH=width, M=m, AHEAD=AHEAD[m], num_warps=1,
    )  # fmt: skip
    return h, leaving


@custom_op("slotmamba::bdlru_backward")
def bdlru_backward(
    grad_h: Tensor, grad_leaving: Tensor, v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, gates and state, in their dtypes."""
    grad_h, grad_leaving, h = grad_h.contiguous(), grad_leaving.contiguous(), h.contiguous()
    v, gates, state = v.contiguous(), gates.contiguous(), state.contiguous()
    doc_start = None if doc_start is None else doc_start.contiguous()
    batch, length, width = v.shape
    m = gates.shape[3]
    grad_v, grad_gates, grad_state = torch.empty_like(v), torch.empty_like(gates), torch.empty_like(state)
    chunk, chunks, grid = _grid(batch, length, width, m)
    carried = None
    if chunks > 1:
        carried = _carry(grad_h, gates, doc_start, grad_leaving, chunk, chunks, backward=True)
    scan_chunks_backward[grid](
        grad_h, v, gates, doc_start, state, h, grad_leaving, carried, grad_v, grad_gates, grad_state,
        length, chunk, chunks, WIDTH=width, M=m, AHEAD=AHEAD_BACKWARD[m], num_warps=1,
    )  # fmt: skip
    return grad_v, grad_gates, grad_state


def _grid(batch: int, length: int, width: int, m: int) -> tuple[int, int, tuple[int, int, int]]:
    """Tokens of a chunk, chunks, and the launch's programs."""
    chunk = chunk_length(batch, length, width, m)
    chunks = -(-length // chunk)
    return chunk, chunks, (-(-width // LANES.value), chunks, batch)


def _carry(
    v: Tensor, gates: Tensor, doc_start: Tensor | None, state: Tensor, chunk: int, chunks: int, backward: bool
) -> Tensor:
    """What enters every chunk of the walk but its first, which `state` enters: [B, chunks-1, D]."""
    batch, length, width = v.shape
    m = gates.shape[3]
    programs = -(-width // LANES.value)
    maps = state.new_empty(batch, chunks - 1, width, m + 1)
    cuts = None if doc_start is None else doc_start.new_empty(batch, chunks - 1, dtype=torch.int32)
    carried = state.new_empty(batch, chunks - 1, width)
    compose_chunks[(programs, chunks - 1, batch)](
        v, gates, doc_start, maps, cuts, length, chunk, chunks,
        WIDTH=width, M=m, AHEAD=AHEAD_COMPOSING[m], BACKWARD=backward, num_warps=1,
    )  # fmt: skip
    scan_chunks[(programs, 1, batch)](
        None, maps, cuts, state, None, carried, None, chunks - 1, chunks - 1, 1,
        WIDTH=width, M=m, AHEAD=AHEAD_COMPOSING[m], num_warps=1,
    )  # fmt: skip
    return carried


@bdlru_forward.register_fake
def _(v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@bdlru_backward.register_fake
def _(
    grad_h: Tensor, grad_leaving: Tensor, v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), gates.new_empty(gates.shape), state.new_empty(state.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _backward(ctx: Any, grad_h: Tensor, grad_leaving: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *bdlru_backward(grad_h, grad_leaving, *ctx.saved_tensors), None


bdlru_forward.register_autograd(_backward, setup_context=_save)
