"""The read of hksa.md section 3 on a table of slot states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slotmamba_kernels.hksa.scan import rows, segment_sum

BLOCK = 1024  # token rows gathered at once: small enough for the cache, large enough to hide the calls


class SlotRead(torch.autograd.Function):
    """Softmax attention of each token over the K states that its reads point at.

    Inputs: q [R, d]; log_weight [R, K]; states [P, 2, d] and z [P] (the table); read_row [R, K]. Output: o [R, d].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, log_weight: Tensor, states: Tensor, z: Tensor, read_row: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        inverse_z = rows(z.reciprocal(), read_row)
        o, p = torch.empty_like(q), torch.empty_like(log_weight)
        for block in _blocks(len(q)):
            seen = rows(states, read_row[block])  # [block, K, 2, d]
            similarity = torch.einsum("rkd,rd->rk", seen[:, :, 0], q[block]) * inverse_z[block] * scale
            p[block] = (similarity + log_weight[block]).softmax(-1)
            o[block] = torch.einsum("rkd,rk->rd", seen[:, :, 1], p[block] * inverse_z[block])
        ctx.save_for_backward(q, states, read_row, inverse_z, p)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, states, read_row, inverse_z, p = ctx.saved_tensors
        grad = grads[0]
        scale = q.shape[-1] ** -0.5
        d_q, d_scores, d_z = torch.empty_like(q), torch.empty_like(p), torch.empty_like(p)
        for block in _blocks(len(q)):
            seen, inverse = rows(states, read_row[block]), inverse_z[block]
            d_p = torch.einsum("rkd,rd->rk", seen[:, :, 1], grad[block]) * inverse
            d_scores[block] = p[block] * (d_p - (p[block] * d_p).sum(-1, keepdim=True))
            d_q[block] = torch.einsum("rkd,rk->rd", seen[:, :, 0], d_scores[block] * inverse * scale)
            similarity = torch.einsum("rkd,rd->rk", seen[:, :, 0], q[block]) * inverse * scale
            d_z[block] = -(d_scores[block] * similarity + p[block] * d_p) * inverse

        # A read puts a rank-one adjoint on the state it saw: multiples of q on keys, of the output's gradient on
        # values. Sorted by state and summed bag by bag: no atomics, so the result is the same every time.
        read, order = read_row.flatten().sort(stable=True)
        offsets = torch.searchsorted(read, torch.arange(len(states) + 1, device=read.device))
        token = order // read_row.shape[1]
        d_states = torch.empty_like(states)
        d_states[:, 0] = segment_sum(q, token, (d_scores * inverse_z * scale).flatten()[order], offsets)
        d_states[:, 1] = segment_sum(grad.contiguous(), token, (p * inverse_z).flatten()[order], offsets)
        d_z = segment_sum(d_z.view(-1, 1), order, None, offsets).squeeze(-1)
        return d_q, d_scores, d_states, d_z, None


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]
