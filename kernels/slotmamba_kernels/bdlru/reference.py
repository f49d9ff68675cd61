"""BD-LRU token by token: the definition, with autograd's own gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def bdlru_reference(v: Tensor, gates: Tensor, state: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.bdlru`; the arguments are checked and of the state's dtype."""
    m = gates.shape[-1] - 1
    h = state.unflatten(-1, (-1, m))
    outputs = []
    for t, (v_t, gates_t) in enumerate(zip(v.unflatten(-1, (-1, m)).unbind(1), gates.unbind(1), strict=True)):
        if doc_start is not None:
            h = h.masked_fill((doc_start[:, t] == t)[:, None, None], 0)
        h = (gates_t[..., :m] @ h.unsqueeze(-1)).squeeze(-1) + gates_t[..., m] * v_t
        outputs.append(h)
    return torch.stack(outputs, 1).flatten(2), h.flatten(1)
