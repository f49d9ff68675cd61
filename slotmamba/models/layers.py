"""Layers without state."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """y = W_down(silu(W_gate x) * W_up x), x and y [..., d_model] (Shazeer, arXiv:2002.05202).

    Args:
        d_model: channels of x and y.
        hidden: channels in between, rounded up to a multiple of 8, the granularity of tensor cores.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        hidden = -(-hidden // 8) * 8
        self.gate_proj = nn.Linear(d_model, hidden, bias=False)
        self.up_proj = nn.Linear(d_model, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
