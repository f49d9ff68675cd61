"""The recurrences along the chains of a plan, each with a backward pass of its own.

Written out by hand because autograd over thousands of small steps would keep every intermediate: here the forward pass
keeps the states after each write and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slotmamba_kernels.hksa.plan import Plan, Schedule


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension. Faster than x[index] on a CPU, where index_select copies whole rows."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def segment_sum(table: Tensor, index: Tensor, weights: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Sums of table rows [N, d] over bags, [G, d]: index [G, K], or [N'] with offsets [G + 1]; weights alike."""
    return F.embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=offsets is not None
    )


class AffineScan(torch.autograd.Function):
    """x <- scale * x + shift along each chain, for scalars.

    Inputs: initial [C], scale [E], shift [E] (in table order). Output: table [C + E].
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, initial: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        table = torch.cat([initial, shift])
        for before, after, event in plan.schedule.spans():
            table[after].addcmul_(table[before], scale[event])
        ctx.schedule = plan.schedule
        ctx.save_for_backward(table, scale)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        table, scale = ctx.saved_tensors
        schedule: Schedule = ctx.schedule
        adjoint = grads[0].clone()
        d_scale = torch.empty_like(scale)
        for before, after, event in reversed(schedule.spans()):
            torch.mul(adjoint[after], table[before], out=d_scale[event])
            adjoint[before].addcmul_(adjoint[after], scale[event])
        return None, adjoint[: schedule.chains], d_scale, adjoint[schedule.chains :]


class WriteScan(torch.autograd.Function):
    """The write of hksa.md section 2 on key and value memory together, along each chain.

    S <- decay * S;  for j: S <- S + step_j * (u_j - k_j (k_j . S));  S <- keep * S + add   (the last one when injected)

    Inputs: initial [C, 2, d]; k [R, n, d] and u [R, n, 2, d] by token row; decay [E], step [E, n], and keep [E, 2],
    add [E, 2, d] or None, in table order. Output: table [C + E, 2, d].
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        initial: Tensor,
        k: Tensor,
        u: Tensor,
        decay: Tensor,
        step: Tensor,
        keep: Tensor | None,
        add: Tensor | None,
    ) -> Tensor:
        table = initial.new_empty(plan.chains + len(plan.token), *initial.shape[1:])
        table[: plan.chains] = initial
        for before, after, event in plan.schedule.spans():
            state = table[after]
            torch.mul(table[before], decay[event].view(-1, 1, 1), out=state)
            _householder(state, rows(k, plan.token[event]), rows(u, plan.token[event]), step[event])
            if keep is not None and add is not None:
                state.mul_(keep[event].unsqueeze(-1)).add_(add[event])
        ctx.schedule = plan.schedule
        ctx.save_for_backward(table, k, u, decay, step, keep, add, plan.token, plan.write_row)
        return table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        table, k, u, decay, step, keep, add, token, write_row = ctx.saved_tensors
        schedule: Schedule = ctx.schedule
        events, n = step.shape
        adjoint = grads[0].clone()
        d_decay, d_step = torch.empty_like(decay), torch.empty_like(step)
        d_keep = None if keep is None else torch.empty_like(keep)
        d_add = None if add is None else torch.empty_like(add)
        # What each write leaves for its token, summed over the token's K writes at the end.
        d_k_event = k.new_empty(events, n, k.shape[-1])
        d_u_event = u.new_empty(events, n, *u.shape[2:])

        for before, after, event in reversed(schedule.spans()):
            k_t, u_t, step_t = rows(k, token[event]), rows(u, token[event]), step[event]
            state = table[before]
            states = _householder_states(state * decay[event].view(-1, 1, 1), k_t, u_t, step_t)
            grad = adjoint[after]
            if d_keep is not None and d_add is not None:
                d_add[event] = grad
                d_keep[event] = (grad * states[-1]).sum(-1)
                grad = grad * keep[event].unsqueeze(-1)
            for j in reversed(range(n)):
                key, size = k_t[:, j].unsqueeze(1), step_t[:, j].view(-1, 1, 1)
                along_grad = (grad * key).sum(-1, keepdim=True)
                along_state = (states[j] * key).sum(-1, keepdim=True)
                torch.mul(grad, size, out=d_u_event[event, j])
                d_step[event, j] = (grad * u_t[:, j]).sum((1, 2)) - (along_grad * along_state).sum((1, 2))
                d_k_event[event, j] = -(size * (along_grad * states[j] + along_state * grad)).sum(1)
                grad = torch.addcmul(grad, key, -size * along_grad)
            d_decay[event] = (grad * state).sum((1, 2))
            adjoint[before].addcmul_(grad, decay[event].view(-1, 1, 1))

        writes = (write_row - schedule.chains).unsqueeze(1) * n  # [R, 1, K]
        bags = (writes + torch.arange(n, device=k.device).view(-1, 1)).flatten(0, 1)
        d_k = segment_sum(d_k_event.flatten(0, 1), bags).view_as(k)
        d_u = segment_sum(d_u_event.view(events * n, -1), bags).view_as(u)
        return None, adjoint[: schedule.chains], d_k, d_u, d_decay, d_step, d_keep, d_add


def _householder(state: Tensor, k: Tensor, u: Tensor, step: Tensor) -> None:
    """In place S <- S + step_j (u_j - k_j (k_j . S)) for each j. state [A, 2, d], k [A, n, d], u [A, n, 2, d]."""
    for j in range(step.shape[1]):
        key, size = k[:, j].unsqueeze(1), step[:, j].view(-1, 1, 1)
        along = (state * key).sum(-1, keepdim=True)
        state.addcmul_(u[:, j], size).addcmul_(key, -size * along)


def _householder_states(state: Tensor, k: Tensor, u: Tensor, step: Tensor) -> list[Tensor]:
    """The states before the first step, after it, ..., after the last."""
    states = [state]
    for j in range(step.shape[1]):
        state = state.clone()
        _householder(state, k[:, j : j + 1], u[:, j : j + 1], step[:, j : j + 1])
        states.append(state)
    return states
