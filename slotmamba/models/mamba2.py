"""Mamba-2: the mixer, and its bidirectional form for encoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmamba.config.schema import SSMConfig
from slotmamba.models.initial import constant, starts
from slotmamba_kernels.ssd import ssd

SHORTEST_STEP, LONGEST_STEP = 1e-3, 0.1
SLOWEST_DECAY, FASTEST_DECAY = 1.0, 16.0


class Mamba2(nn.Module):
    """The causal mixer of Mamba-2 (arXiv:2405.21060, section 7), one group of B and C.

    Parameters have the names, shapes and order of channels of mamba-ssm's Mamba2, and start as there: softplus(dt_bias)
    log-uniform in [1e-3, 0.1], A = -exp(A_log) uniform in [-16, -1], D ones, matrices and the convolution as PyTorch's
    layers do.

    Args:
        d_model: channels C of x and y.
        config: the recipe's model.ssm; expand * d_model must be a multiple of head_dim.
    """

    def __init__(self, d_model: int, config: SSMConfig) -> None:
        super().__init__()
        width = config.expand * d_model
        if width % config.head_dim:
            raise ValueError(f"Mamba2: expand*d_model={width} is not divisible by head_dim={config.head_dim}")
        self.config, self.width, self.heads = config, width, width // config.head_dim
        convolved = width + 2 * config.state_size
        self.in_proj = nn.Linear(d_model, width + convolved + self.heads, bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, config.conv_size, groups=convolved, padding=config.conv_size - 1)
        self.dt_bias = starts(nn.Parameter(torch.empty(self.heads)), _starting_steps)
        self.A_log = starts(nn.Parameter(torch.empty(self.heads)), _starting_decays)
        self.D = starts(nn.Parameter(torch.empty(self.heads)), constant(1.0))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.out_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> y [B, T, C]."""
        config, length = self.config, x.shape[1]
        z, u, dt = self.in_proj(x).split([self.width, self.conv1d.in_channels, self.heads], -1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., :length].transpose(1, 2))
        u, b, c = u.split([self.width, config.state_size, config.state_size], -1)
        y, _ = ssd(
            u.unflatten(-1, (self.heads, config.head_dim)),
            # Under autocast step sizes and decays, and the norm below, keep the precision of the parameters.
            F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias),
            -self.A_log.exp(),
            b.unsqueeze(2),
            c.unsqueeze(2),
            self.D,
            chunk_size=config.chunk_size,
        )
        gated = y.flatten(2) * F.silu(z)
        return self.out_proj(self.norm(gated.to(self.norm.weight.dtype)))


class BiMamba2(nn.Module):
    """One mixer along the row and another, with its own parameters, along the reversed row; outputs are summed."""

    def __init__(self, d_model: int, config: SSMConfig) -> None:
        super().__init__()
        self.forward_mixer = Mamba2(d_model, config)
        self.backward_mixer = Mamba2(d_model, config)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> y [B, T, C]; valid [B, T] is False for padding.

        Tokens are affected by padding nowhere in the row, neither through states nor through convolutions: in both
        directions the tokens go first, side by side, and padding after them. At padding y means nothing.
        """
        if valid is None:
            return self.forward_mixer(x) + self.backward_mixer(x.flip(1)).flip(1)
        place = torch.arange(x.shape[1], device=x.device)
        return _mix_in_order(self.forward_mixer, x, torch.where(valid, place, len(place))) + _mix_in_order(
            self.backward_mixer, x, torch.where(valid, -place, 1)
        )


def _starting_steps(dt_bias: Tensor, generator: torch.Generator | None) -> None:
    step = dt_bias.uniform_(math.log(SHORTEST_STEP), math.log(LONGEST_STEP), generator=generator).exp()
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def _starting_decays(a_log: Tensor, generator: torch.Generator | None) -> None:
    a_log.uniform_(SLOWEST_DECAY, FASTEST_DECAY, generator=generator).log_()


def _mix_in_order(mixer: Mamba2, x: Tensor, rank: Tensor) -> Tensor:
    """Runs the mixer over the tokens of x [B, T, C] sorted by rank [B, T], and puts its outputs back in place."""
    order = rank.argsort(dim=1, stable=True).unsqueeze(-1)
    y = mixer(x.gather(1, order.expand_as(x)))
    return torch.zeros_like(y).scatter(1, order.expand_as(y), y)
