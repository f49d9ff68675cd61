"""Kronecker addressing in PyTorch: any device, dtype and size."""

from __future__ import annotations

import torch
from torch import Tensor

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
        ranked, order = sums.sort(dim=-1, descending=True, stable=True)
        best, kept = ranked[..., :k], order[..., :k]
        indices = indices.gather(-1, kept // size) * size + kept % size
        normaliser = normaliser * totals[..., u, :]
    return indices.to(torch.int32), best.exp() / normaliser
