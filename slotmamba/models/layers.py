"""Layers without state."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from slotmamba_kernels import linear_cross_entropy


class OutputMatrix(nn.Linear):
    """Logits of the vocabulary, or their cross-entropy without ever holding all of them.

    The losses are made here rather than by whoever needs them, because what wraps a module (to gather its shards, say)
    does so around its forward.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """x [..., d_model] -> logits [..., V]; with targets [N] and x [N, d_model] what
        `slotmamba_kernels.linear_cross_entropy` returns: nll, log_partition and correct, [N] each."""
        return super().forward(x) if targets is None else linear_cross_entropy(x, self.weight, targets)


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
