"""Kronecker addressing in PyTorch: any device, dtype and size."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.dtypes import state_dtype


def kronecker_topk_torch(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.kronecker_topk`; the arguments are checked.

    Sums are taken over logits whose factor's largest is subtracted, in the order of the factors: the same float32
    operations as in the fused kernel, so that both find the same slots, ties included. The sort is stable for the ties.
    """
    factors, size = logits.shape[-2:]
    entries = logits.to(state_dtype(logits))
    entries = entries - entries.detach().amax(-1, keepdim=True)
    best = entries.new_zeros(*entries.shape[:-2], 1)
    indices = torch.zeros_like(best, dtype=torch.long)
    for u in range(factors):
        sums = (best.unsqueeze(-1) + entries[..., u, :].unsqueeze(-2)).flatten(-2)
        ranked, order = sums.sort(dim=-1, descending=True, stable=True)
        best, kept = ranked[..., :k], order[..., :k]
        indices = indices.gather(-1, kept // size) * size + kept % size
    return indices.to(torch.int32), (best - entries.logsumexp(-1).sum(-1, keepdim=True)).exp()
