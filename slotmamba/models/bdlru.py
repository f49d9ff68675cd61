"""The BD-LRU layer: projections and gates around the block-diagonal recurrence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slotmamba.models.initial import starts
from slotmamba.models.layers import TF32Linear
from slotmamba_kernels.bdlru import bdlru

SHORTEST_MEMORY = 2.0
LONGEST_MEMORY = 128.0


class BDLRU(nn.Module):
    """y = W_o h with h_t = A_t h_(t-1) + a0_t * v_t, v = W_v x, and [A_t, a0_t] = softmax(W_g x_t + b) row by row
    (arXiv:2602.12021, section 3).

    The paper's layer ends with h. Here W_o follows, because the layer stands in a residual stream: without it block k
    could only write to its own m channels of the stream, and not at a scale of its own.

    The gates start around values that b alone gives. In every row of a block the input gate is 1/tau, so that the block
    as a whole forgets with a time constant of tau tokens; the other channels of the block share (1/tau)(1 - 1/tau), and
    the diagonal, the rest, is (1 - 1/tau)^2 (1 - 1/tau where m = 1). tau runs geometrically over the blocks, from about
    2 tokens, which hands on the token before, to about 128. Gates of zero logits would forget in m + 1 tokens
    everywhere. Matrices start as nn.Linear's.

    Args:
        d_model: channels C of x and y, a multiple of block_size.
        block_size: channels m of a block.
    """

    def __init__(self, d_model: int, block_size: int) -> None:
        super().__init__()
        if d_model % block_size:
            raise ValueError(f"BDLRU: d_model={d_model} is not divisible by block_size={block_size}")
        self.d_model, self.block_size = d_model, block_size
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.gate_proj = TF32Linear(d_model, d_model * (block_size + 1))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        starts(
            self.gate_proj.bias,
            lambda bias, _: bias.copy_(_starting_gates(d_model // block_size, block_size).log().flatten()),
        )
        # Decay would pull the gates back to forgetting in m + 1 tokens.
        self.gate_proj.weight.no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self, x: Tensor, state: Tensor | None = None, doc_start: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C] -> y [B, T, C] and the state [B, C] after the last token, float32 or wider.

        state: [B, C] before the first token, None is zeros; doc_start: [B, T] as in `slotmamba_kernels.bdlru`; valid:
        [B, T], False for padding, which leaves the state as it is (y there means nothing).
        """
        m = self.block_size
        gates = self._gates(x)
        if valid is not None:
            keep = torch.eye(m, m + 1, dtype=gates.dtype, device=gates.device)
            gates = torch.where(valid[:, :, None, None, None], gates, keep)
        h, state = bdlru(self.v_proj(x), gates, state, doc_start)
        return self.out_proj(h), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token: x [B, C] and the state before it -> y [B, C] and the state after it."""
        y, state = self(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def init_state(self, batch: int, device: torch.device | None = None) -> Tensor:
        """The state [batch, C] before the first token."""
        return torch.zeros(batch, self.d_model, device=device)

    def _gates(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C/m, m, m+1] in the precision of the parameters, under autocast too: a slow block's
        1 - 1/tau is next to 1, where bfloat16 has steps of 1/256."""
        m = self.block_size
        return self.gate_proj(x).unflatten(-1, (-1, m, m + 1)).softmax(-1)


def _starting_gates(blocks: int, m: int) -> Tensor:
    """Gates [blocks, m, m+1] of a layer whose input is zero; every row sums to 1."""
    place = (torch.arange(blocks, dtype=torch.float64) + 0.5) / blocks
    tau = SHORTEST_MEMORY * torch.exp(place * math.log(LONGEST_MEMORY / SHORTEST_MEMORY))
    gates = torch.zeros(blocks, m, m + 1, dtype=torch.float64)
    gates[:, :, m] = (1 / tau)[:, None]
    if m > 1:
        gates[:, :, :m] = (1 / tau * (1 - 1 / tau) / (m - 1))[:, None, None]
    diagonal = gates[:, :, :m].diagonal(dim1=-2, dim2=-1)
    diagonal.copy_((1 - 1 / tau).pow(1 if m == 1 else 2)[:, None].expand(blocks, m))
    return gates
