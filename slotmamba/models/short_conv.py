"""A causal depthwise convolution over a few tokens that never crosses a document's start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmamba.models.initial import starts


class ShortConv(nn.Module):
    """y_t = sum_i w_i * x_(t-i) for i = 0 .. taps-1, channel by channel, over the tokens of t's own document.

    Starts as a shift by one token (tap 1 is 1, the others small): that is what tells a value which key came before it.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.taps = taps
        self.weight = starts(nn.Parameter(torch.empty(channels, taps)), _shift_by_one)
        self.weight.no_weight_decay = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor, doc_start: Tensor | None = None, window: Tensor | None = None) -> Tensor:
        """x [B, T, channels], doc_start [B, T] as in `slotmamba_kernels.hksa` -> [B, T, channels].

        window: the taps-1 inputs before x, as `step` takes them; None before the first token.
        """
        length, taps = x.shape[1], self.taps
        extended = F.pad(x, (0, 0, taps - 1, 0)) if window is None else torch.cat([window.flip(1), x], 1)
        y = x * self.weight[:, 0]
        position = torch.arange(length, device=x.device)
        for i in range(1, taps):
            earlier = extended[:, taps - 1 - i : taps - 1 - i + length]
            if doc_start is not None:
                earlier = earlier * (position - i >= doc_start).unsqueeze(-1)
            y = y + earlier * self.weight[:, i]
        return y

    def window_after(self, x: Tensor, window: Tensor | None) -> Tensor:
        """The window [B, taps - 1, channels] after the tokens x [B, T, channels], given the one before them."""
        before = self.init_window(len(x)) if window is None else window
        return torch.cat([x[:, 1 - self.taps :].flip(1), before], 1)[:, : self.taps - 1]

    def step(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """One token: x [B, channels] and the taps-1 inputs before it, newest first -> y and the new window."""
        window = torch.cat([x.unsqueeze(1), window], 1)
        # Not a matrix product: autocast would round one to bfloat16, and the parallel form's logits are float32.
        return (window * self.weight.T).sum(1), window[:, :-1]

    def init_window(self, batch: int) -> Tensor:
        """[batch, taps - 1, channels]: nothing before the first token."""
        return self.weight.new_zeros(batch, self.taps - 1, len(self.weight))


def _shift_by_one(weight: Tensor, generator: torch.Generator | None) -> None:
    weight.normal_(0.0, 0.1, generator=generator)
    weight[:, 1] += 1.0
