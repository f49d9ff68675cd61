"""Kronecker addressing: the K heaviest of p^U slots from U softmaxes over p entries, without forming p^U numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.dtypes import state_dtype

__all__ = ["kronecker_topk"]


def kronecker_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K heaviest slots of a Kronecker product of softmaxes, and their weights (hksa.md section 1).

    The weight of slot (i_1, ..., i_U) is the product of the factors' softmax entries; its index is
    sum_u i_u p^(U-u). Factors are merged one at a time and the best K partial sums of logarithms kept, which is exact:
    a top-K product has top-K prefixes only. The weights are not renormalised. Gradient reaches the kept entries only.

    Args:
        logits: [..., U, p], any floating dtype, temperature applied.
        k: slots to keep, 1 <= k <= p^U.

    Returns:
        indices: [..., k] int32, distinct, heaviest first.
        weights: [..., k] in (0, 1), float32 (float64 for float64 logits).

    Raises:
        ValueError: logits with fewer than two dimensions, or k out of range.
    """
    if logits.ndim < 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected [..., U, p]")
    factors, size = logits.shape[-2:]
    if not 1 <= k <= size**factors:
        raise ValueError(f"k={k} is not between 1 and the {size}^{factors} = {size**factors} slots")
    log_factors = torch.log_softmax(logits.to(state_dtype(logits)), -1)
    best, indices = _keep(log_factors[..., 0, :], None, k)
    for u in range(1, factors):
        sums = (best.unsqueeze(-1) + log_factors[..., u, :].unsqueeze(-2)).flatten(-2)
        products = (indices.unsqueeze(-1) * size + torch.arange(size, device=logits.device)).flatten(-2)
        best, indices = _keep(sums, products, k)
    order = best.argsort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, order).to(torch.int32), best.gather(-1, order).exp()


def _keep(sums: Tensor, indices: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest sums and the slot prefixes that they belong to; all of them when there are no more than k."""
    if indices is None:
        indices = torch.arange(sums.shape[-1], device=sums.device).expand_as(sums)
    if sums.shape[-1] <= k:
        return sums, indices
    best, kept = sums.topk(k, -1, sorted=False)
    return best, indices.gather(-1, kept)
