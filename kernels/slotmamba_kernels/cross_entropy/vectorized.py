"""What a block of logits is turned into, in torch operations; low-precision logits are reduced in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.dtypes import state_dtype


def statistics(logits: Tensor, targets: Tensor, nll: Tensor, log_partition: Tensor, correct: Tensor) -> None:
    """Writes nll, log_partition and correct [R] of logits [R, V] with targets [R]; the logits are lost."""
    block = logits.to(state_dtype(logits))
    best, likeliest = block.max(-1)
    of_target = block.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    rest = block.sub_(best.unsqueeze(-1)).exp_().sum(-1).log_()
    torch.add(best, rest, out=log_partition)
    torch.add(best - of_target, rest, out=nll)  # nearer than log_partition - of_target when both are large
    torch.eq(likeliest, targets, out=correct)


def gradient(logits: Tensor, targets: Tensor, log_partition: Tensor, d_nll: Tensor, d_log_partition: Tensor) -> None:
    """Overwrites logits [R, V] with their gradient, given those of nll and log_partition [R]."""
    block = logits.to(state_dtype(logits))
    block.sub_(log_partition.unsqueeze(-1)).exp_().mul_((d_nll + d_log_partition).unsqueeze(-1))
    row = torch.arange(len(targets), device=targets.device)
    block[row, targets] -= d_nll
    if block is not logits:
        logits.copy_(block)
