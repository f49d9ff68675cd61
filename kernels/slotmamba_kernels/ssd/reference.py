"""SSD token by token: the definition, with autograd's own gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.ssd`; the arguments are checked and of the state's dtype. There are no chunks here."""
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(heads_per_group, 2), C.repeat_interleave(heads_per_group, 2)
    h = state
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(dt_t * A)[..., None, None]
        h = decay * h + (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        outputs.append((h @ C_t.unsqueeze(-1)).squeeze(-1))
    y = torch.stack(outputs, 1)
    return (y if D is None else y + D.unsqueeze(-1) * x), h
