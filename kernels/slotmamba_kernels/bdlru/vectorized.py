"""BD-LRU in PyTorch operations over all rows, blocks and chunks of tokens at once, for CPU and GPU.

The T tokens are cut into about sqrt(T) chunks. A first sweep goes through all chunks side by side and composes the
affine map of each; a second carries the state from chunk to chunk; a third repeats the recurrence in all chunks, now
from the right states. That makes 3 sqrt(T) steps one after the other, and no array of prefix matrices for every token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def bdlru_torch(v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.bdlru`; the arguments are checked and of the state's dtype."""
    starts = None if doc_start is None else doc_start == torch.arange(v.shape[1], device=v.device)
    m = gates.shape[-1] - 1
    h = _Recurrence.apply(v.unflatten(-1, (-1, m)), gates, state.unflatten(-1, (-1, m)), starts).flatten(2)
    return h, h[:, -1].clone()  # not a view: who keeps the state need not keep all of h


class _Recurrence(torch.autograd.Function):
    """Saves its inputs and h, not the chunks' maps: the backward pass is the same scan from the other end.

    v [B, T, H, m], gates [B, T, H, m, m+1], state [B, H, m], starts bool [B, T] or None -> h [B, T, H, m].
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, gates: Tensor, state: Tensor, starts: Tensor | None) -> Tensor:
        h = _scan(gates[..., :-1], gates[..., -1] * v, state, starts)
        ctx.save_for_backward(v, gates, state, starts, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        v, gates, state, starts, h = ctx.saved_tensors
        matrices, input_gates = gates[..., :-1], gates[..., -1]
        # With g_t the whole gradient of h_t: g_t = grad_h_t + A_(t+1)^T g_(t+1), from the last token to the first.
        ends = None if starts is None else starts[:, 1:]
        g = _scan(matrices[:, 1:].transpose(-1, -2), grad_h, torch.zeros_like(state), ends, reverse=True)

        previous = torch.cat([state.unsqueeze(1), h[:, :-1]], 1)
        grad_state = (matrices[:, 0] * g[:, 0].unsqueeze(-1)).sum(-2)
        if starts is not None:
            previous = previous.masked_fill(starts[..., None, None], 0)
            grad_state = grad_state.masked_fill(starts[:, 0, None, None], 0)
        grad_gates = torch.empty_like(gates)
        torch.mul(g.unsqueeze(-1), previous.unsqueeze(-2), out=grad_gates[..., :-1])
        torch.mul(g, v, out=grad_gates[..., -1])
        return g * input_gates, grad_gates, grad_state, None


def _scan(matrices: Tensor, inputs: Tensor, state: Tensor, cut: Tensor | None, reverse: bool = False) -> Tensor:
    """h_t = A_t h_(t-1) + b_t for every row and block; with `reverse`, h_t = A_t h_(t+1) + b_t.

    matrices A [B, <=T, H, m, m], those missing at the end are zero; inputs b [B, T, H, m]; state [B, H, m] before the
    first (last) token; cut bool [B, <=T], where A counts as zero. Returns h [B, T, H, m].
    """
    batch, length, blocks, m = inputs.shape
    size = math.isqrt(length - 1) + 1
    count = -(-length // size)
    A, b = _to_chunks(matrices, size, count), _to_chunks(inputs, size, count)
    if cut is not None:
        A *= ~_to_chunks(cut.unsqueeze(-1).expand(-1, -1, blocks), size, count)[:, None, None]
    steps, chunks = list(range(size)), list(range(count))
    if reverse:
        steps, chunks = steps[::-1], chunks[::-1]

    # Sweep 1: the map h -> M h + c of each whole chunk, as the m columns of M and a last column c.
    maps = torch.cat([A[steps[0]], b[steps[0]].unsqueeze(1)], 1)
    for step in steps[1:]:
        longer = F.pad(b[step].unsqueeze(1), (0, 0, m, 0))
        for j in range(m):
            longer.addcmul_(A[step, :, j].unsqueeze(1), maps[j])
        maps = longer

    # Sweep 2: the state that enters each chunk.
    maps = maps.unflatten(-1, (count, batch * blocks))
    entering = torch.empty_like(maps[:, 0])
    current = state.movedim(-1, 0).flatten(1)
    for chunk in chunks:
        entering[:, chunk] = current
        current = (maps[:, :m, chunk] * current).sum(1) + maps[:, m, chunk]

    # Sweep 3: the recurrence, into the inputs, which it uses up.
    h = entering.flatten(1)
    for step in steps:
        h = b[step].add_((A[step] * h).sum(1))
    in_order = b.view(size, m, count, batch, blocks).permute(3, 2, 0, 4, 1)
    return in_order.reshape(batch, size * count, blocks, m)[:, :length]


def _to_chunks(x: Tensor, size: int, count: int) -> Tensor:
    """[B, <=size*count, H, ...] -> fresh [size, ..., count*B*H]: token c*size + s is step s of chunk c, others zero.

    The entries of the tiny blocks come before the long axis, so that sums over them run along whole vectors: on CPU
    that is several times as fast as batched products of m x m matrices.
    """
    batch, length, blocks, *rest = x.shape
    chunked = x.new_empty(size, *rest, count, batch, blocks)
    in_order = chunked.movedim((-2, -3, 0, -1), (0, 1, 2, 3))
    full = length // size
    in_order[:, :full] = x[:, : full * size].unflatten(1, (full, size))
    if full < count:
        tail = length - full * size
        in_order[:, full, :tail] = x[:, full * size :]
        in_order[:, full, tail:] = 0
    return chunked.flatten(-3)
