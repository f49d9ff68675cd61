"""Kronecker addressing in PyTorch: any device, dtype and size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slotmamba_kernels.dtypes import state_dtype


def kronecker_topk_torch(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.kronecker_topk`; the arguments are checked.

    Sums are taken over logits whose factor's largest is subtracted, in the order of the factors: the same float32
    operations as in the fused kernel, so that both find the same slots, ties included. The sort is stable for the ties.
    The product of the normalisers is at most p^U.
    """
    factors, size = logits.shape[-2:]
    entries = logits.to(state_dtype(logits))
    entries = entries - entries.detach().amax(-1, keepdim=True)
    totals = entries.exp().sum(-1, keepdim=True)  # [..., U, 1]
    normaliser = torch.ones_like(totals[..., 0, :])
    best = torch.zeros_like(normaliser)
    indices = torch.zeros_like(best, dtype=torch.long)
    for u in range(factors):
        sums = (best.unsqueeze(-1) + entries[..., u, :].unsqueeze(-2)).flatten(-2)
        order = sums.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
        best = _Pick.apply(sums, order)
        indices = indices.gather(-1, order // size) * size + order % size
        normaliser = normaliser * totals[..., u, :]
    return indices.to(torch.int32), best.exp() / normaliser


class _Pick(torch.autograd.Function):
    """The entries of the last dimension with these distinct indices.

    As they are distinct their gradients need not be added up, as those of `gather` are, with atomics on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.gather(-1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).scatter_(-1, index, grads[0]), None
