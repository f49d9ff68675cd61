"""Layers without state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
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


def for_products(x: Tensor) -> Tensor:
    """x in the precision in which autocast multiplies, for several linear layers: each would make and keep a copy."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
        x = for_products(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Float32Linear(nn.Linear):
    """A linear layer that computes in the precision of its parameters, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] of any float dtype -> [..., out] in the weight's."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class TF32Linear(Float32Linear):
    """One that under autocast on a GPU makes its products in TF32: of the inputs 10 bits of mantissa count instead of
    bfloat16's 7, and nothing is rounded after them. Without autocast they are made as torch is set up."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            y: Tensor = _TF32Product.apply(x.to(self.weight.dtype), self.weight, self.bias)
        return y


class _TF32Product(torch.autograd.Function):
    """x [..., in] times weight [out, in], plus bias [out], float32; the products of the backward pass in TF32 too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with _tf32():
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        with _tf32():
            return grad @ weight, rows.mT @ x.flatten(0, -2), rows.sum(0)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
