"""HKSA token by token: the definition of hksa.md, sections 2 and 3, with autograd's own gradients.

Slow and plain on purpose. Every other backend is tested against it in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slotmamba_kernels.hksa.arguments import Inject, Surprise
from slotmamba_kernels.hksa.state import SlotState

MAX_DECAY_WEIGHT = 0.999  # keeps the gradient of log1p(-w) finite
MIN_READ_WEIGHT = 1e-30
MIN_BETA_SUM = 1e-30  # all step sizes 0: the mean of the written vectors is 0, not 0/0


@dataclass(frozen=True)
class _Write:
    """What one token writes: k, u_k, u_v [B, H, n, d]; beta [B, H, n]; index, w [B, H, K]; its injection or None."""

    k: Tensor
    u_k: Tensor
    u_v: Tensor
    beta: Tensor
    index: Tensor
    w: Tensor
    inject: Inject | None


def hksa_reference(
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_idx: Tensor,
    write_w: Tensor,
    read_idx: Tensor,
    read_w: Tensor,
    gamma: Tensor,
    *,
    state: SlotState,
    doc_start: Tensor | None,
    surprise: Surprise | None,
    inject: Inject | None,
) -> tuple[Tensor, SlotState]:
    """See `slotmamba_kernels.hksa`; the arguments are checked and of the state's dtype."""
    fresh = state.map(torch.zeros_like)
    fresh = SlotState(fresh.S_k, fresh.S_v, torch.full_like(state.z, 1.0 / state.z.shape[-1]), fresh.surprise)
    outputs = []
    for t in range(q.shape[1]):
        if doc_start is not None:
            state = _select(doc_start[:, t] == t, fresh, state)
        write = _Write(
            k[:, t], u_k[:, t], u_v[:, t], beta[:, t], write_idx[:, t].long(), write_w[:, t],
            None if inject is None else tuple(x[:, t] for x in inject),  # type: ignore[arg-type]
        )  # fmt: skip
        state = _write(state, write, gamma, surprise)
        outputs.append(_read(state, q[:, t], read_idx[:, t].long(), read_w[:, t]))
    return torch.stack(outputs, 1), state


def _select(condition: Tensor, yes: SlotState, no: SlotState) -> SlotState:
    """Row by row of the batch, `yes` where condition [B] holds."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.view(-1, *[1] * (a.ndim - 1)), a, b)

    return SlotState(pick(yes.S_k, no.S_k), pick(yes.S_v, no.S_v), pick(yes.z, no.z), pick(yes.surprise, no.surprise))


def _rows(memory: Tensor, index: Tensor) -> Tensor:
    """memory [B, H, M, d] at index [B, H, K] -> [B, H, K, d]."""
    return memory.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, memory.shape[-1]))


def _store(memory: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return memory.scatter(2, index.unsqueeze(-1).expand_as(rows), rows)


def _write(state: SlotState, write: _Write, gamma: Tensor, surprise: Surprise | None) -> SlotState:
    """Section 2: decay the active slots, then edit them with the Householder steps, then inject."""
    w = write.w
    s_k, s_v = _rows(state.S_k, write.index), _rows(state.S_v, write.index)
    z, surprised = state.z.gather(2, write.index), state.surprise.gather(2, write.index)

    if surprise is not None:
        a_s, eta = (x.view(1, -1, 1) for x in surprise)
        error_k, error_v = _prediction_errors(s_k, s_v, z, write)
        error = a_s * error_k + (1 - a_s) * error_v
        surprised = surprised + (1 - eta) * w * (error - surprised)

    decay = torch.exp(gamma.view(1, -1, 1) * torch.log1p(-w.clamp(max=MAX_DECAY_WEIGHT)))
    s_k, s_v, z = decay.unsqueeze(-1) * s_k, decay.unsqueeze(-1) * s_v, decay * z + w
    for j in range(write.k.shape[2]):
        k = write.k[:, :, j].unsqueeze(2)
        step = (w * write.beta[:, :, j].unsqueeze(-1)).unsqueeze(-1)
        s_k = s_k + step * (write.u_k[:, :, j].unsqueeze(2) - k * (k * s_k).sum(-1, keepdim=True))
        s_v = s_v + step * (write.u_v[:, :, j].unsqueeze(2) - k * (k * s_v).sum(-1, keepdim=True))
    if write.inject is not None:
        c_k, c_v, lam_k, lam_v = write.inject
        # Padding (w = 0) changes nothing, so it injects nothing either.
        lam_k, lam_v = (torch.where(w > 0, lam, 0).unsqueeze(-1) for lam in (lam_k, lam_v))
        s_k = (1 - lam_k) * s_k + lam_k * z.unsqueeze(-1) * c_k
        s_v = (1 - lam_v) * s_v + lam_v * z.unsqueeze(-1) * c_v

    return SlotState(
        _store(state.S_k, write.index, s_k),
        _store(state.S_v, write.index, s_v),
        state.z.scatter(2, write.index, z),
        state.surprise.scatter(2, write.index, surprised),
    )


def _prediction_errors(s_k: Tensor, s_v: Tensor, z: Tensor, write: _Write) -> tuple[Tensor, Tensor]:
    """Mean squared distance of what the slots hold from what is about to be written, [B, H, K] each; no gradient."""
    beta = write.beta.unsqueeze(-1)
    total = beta.sum(2).clamp(min=MIN_BETA_SUM)
    mean_k = ((beta * write.u_k).sum(2) / total).unsqueeze(2)
    mean_v = ((beta * write.u_v).sum(2) / total).unsqueeze(2)
    error_k = (s_k / z.unsqueeze(-1) - mean_k).square().mean(-1)
    error_v = (s_v / z.unsqueeze(-1) - mean_v).square().mean(-1)
    return error_k.detach(), error_v.detach()


def _read(state: SlotState, q: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Section 3: softmax attention over the K addressed slots. q [B, H, d] -> [B, H, d]."""
    z = state.z.gather(2, index).unsqueeze(-1)
    content_k, content_v = _rows(state.S_k, index) / z, _rows(state.S_v, index) / z
    scores = (content_k * q.unsqueeze(2)).sum(-1) * q.shape[-1] ** -0.5
    scores = scores + weight.clamp(min=MIN_READ_WEIGHT).log()
    return (scores.softmax(-1).unsqueeze(-1) * content_v).sum(2)
