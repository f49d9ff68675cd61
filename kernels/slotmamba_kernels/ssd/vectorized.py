"""SSD by chunks (Mamba-2, arXiv:2405.21060, section 6): matrix products within chunks, a short loop over chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_torch(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.ssd`; the arguments are checked and of the state's dtype."""
    length, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    size = min(chunk_size, length)
    per_group = (groups, heads // groups)
    # Dimensions from here on: batch, chunk, group, head of the group, token of the chunk, channels.
    log_decay = _to_chunks(dt * A, size).unflatten(2, per_group)
    inputs = _to_chunks(dt.unsqueeze(-1) * x, size).unflatten(2, per_group)
    keys, queries = _to_chunks(B, size).unsqueeze(3), _to_chunks(C, size).unsqueeze(3)

    decay = _segment_sums(log_decay).exp()
    y = (queries @ keys.transpose(-1, -2) * decay) @ inputs

    # What each chunk adds to the state, decayed to the chunk's end, and what it leaves of the state it finds.
    added = (decay[..., -1, :, None] * inputs).transpose(-1, -2) @ keys
    from_start = log_decay.cumsum(-1).exp().unsqueeze(-1)
    kept = from_start[..., -1:, :]
    h = state.unflatten(1, per_group)
    entering = []
    for chunk in range(added.shape[1]):
        entering.append(h)
        h = kept[:, chunk] * h + added[:, chunk]
    y = y + from_start * (queries @ torch.stack(entering, 1).transpose(-1, -2))

    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]
    return (y if D is None else y + D.unsqueeze(-1) * x), h.flatten(1, 2)


def _to_chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, ...] -> [B, chunks, H, size, ...], the end filled with zeros: dt = 0 neither decays nor adds."""
    padding = -x.shape[1] % size
    padded = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, padding))
    return padded.unflatten(1, (-1, size)).transpose(2, 3)


def _segment_sums(x: Tensor) -> Tensor:
    """[..., L] -> [..., L, L]: entry (i, j) is x_(j+1) + ... + x_i, and -inf for j > i.

    Each is summed on its own: a difference of two running sums would lose the digits of a small sum behind a large one.
    """
    size = x.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    addends = x.unsqueeze(-1).expand(*x.shape, size).masked_fill(~lower.tril(-1), 0)
    return addends.cumsum(-2).masked_fill(~lower, -torch.inf)
