"""HKSA vectorised over slots: sort the writes into chains, then advance all chains one write at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.hksa.arguments import Inject, Surprise
from slotmamba_kernels.hksa.plan import Plan, make_plan
from slotmamba_kernels.hksa.read import SlotRead
from slotmamba_kernels.hksa.reference import MAX_DECAY_WEIGHT, MIN_BETA_SUM, MIN_READ_WEIGHT
from slotmamba_kernels.hksa.scan import AffineScan, WriteScan, rows
from slotmamba_kernels.hksa.state import SlotState


def hksa_torch(
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
    num_slots = state.z.shape[-1]
    plan = make_plan(write_idx, read_idx, num_slots, doc_start)
    k, u = k.flatten(0, 2), torch.stack([u_k, u_v], -2).flatten(0, 2)  # [R, n, d], [R, n, 2, d]

    # What depends on the token and its slot alone is computed here, [B, T, H, K], and put in table order by `_ordered`,
    # where every entry moves once. Looking per-token or per-head values up by event would sum their gradients with
    # atomics on a GPU.
    per_head = (1, 1, -1, 1)
    decay = torch.exp(gamma.view(per_head) * torch.log1p(-write_w.clamp(max=MAX_DECAY_WEIGHT)))
    step = write_w.unsqueeze(-1) * beta.unsqueeze(-2)
    w, decay, step = _ordered(write_w, plan), _ordered(decay, plan), _ordered(step, plan)

    z = AffineScan.apply(plan, _initial(state.z, plan, 1.0 / num_slots), decay, w)
    keep, add = _injection(inject, plan, w, z)
    memory = torch.stack([state.S_k, state.S_v], -2)  # [B, H, M, 2, d]
    states = WriteScan.apply(plan, _initial(memory, plan, 0.0), k, u, decay, step, keep, add)

    log_weight = read_w.clamp(min=MIN_READ_WEIGHT).log().flatten(0, 2)
    o = SlotRead.apply(q.flatten(0, 2), log_weight, states, z, plan.read_row)

    surprised = _started(state.surprise, plan, 0.0)
    if surprise is not None:
        a_s, eta = (x.view(per_head) for x in surprise)
        error_k, error_v = _prediction_errors(states, z, beta.flatten(0, 2), u, plan).view(*write_w.shape, 2).unbind(-1)
        rate = (1 - eta) * write_w
        error = a_s * error_k + (1 - a_s) * error_v
        keep_rate, news = _ordered(1 - rate, plan), _ordered(rate * error, plan)
        scores = AffineScan.apply(plan, _initial(state.surprise, plan, 0.0), keep_rate, news)
        surprised = _final(state.surprise, scores, plan, 0.0)

    left = _final(memory, states, plan, 0.0)
    leaving = SlotState(left[..., 0, :], left[..., 1, :], _final(state.z, z, plan, 1.0 / num_slots), surprised)
    return o.view_as(q), leaving


def _ordered(x: Tensor, plan: Plan) -> Tensor:
    """x [B, T, H, K, ...] for each write, in table order: [E, ...]."""
    return rows(x.flatten(0, 3), plan.event)


def _initial(memory: Tensor, plan: Plan, empty: float) -> Tensor:
    """What each chain starts from: the entering memory [B, H, M, ...] or, for a new document, `empty`."""
    entering = rows(memory.flatten(0, 2), plan.memory_row)
    return torch.where(plan.continues.view(-1, *[1] * (entering.ndim - 1)), entering, empty)


def _started(memory: Tensor, plan: Plan, empty: float) -> Tensor:
    """The memory that the document alive at the call's end started from."""
    return torch.where(plan.row_continues.view(-1, *[1] * (memory.ndim - 1)), memory, empty)


def _final(memory: Tensor, table: Tensor, plan: Plan, empty: float) -> Tensor:
    """The memory after the call: the last state of the chains still alive, else what their document started from."""
    started = _started(memory, plan, empty).flatten(0, 2)
    return started.index_copy(0, plan.memory_row[plan.ends], rows(table, plan.end_row)).view_as(memory)


def _injection(inject: Inject | None, plan: Plan, w: Tensor, z: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The write's last line as S <- keep * S + add: keep [E, 2] and add [E, 2, d] in table order, or two Nones."""
    if inject is None:
        return None, None
    c_k, c_v, lam_k, lam_v = inject
    c = _ordered(torch.stack([c_k, c_v], -2), plan)
    lam = _ordered(torch.stack([lam_k, lam_v], -1), plan)
    lam = torch.where(w.unsqueeze(-1) > 0, lam, 0)  # padding injects nothing
    return 1 - lam, (lam * z[plan.chains :].unsqueeze(-1)).unsqueeze(-1) * c


@torch.no_grad()
def _prediction_errors(states: Tensor, z: Tensor, beta: Tensor, u: Tensor, plan: Plan) -> Tensor:
    """Mean squared distance of each written slot, before the write, from what is written: a measurement.

    Returns [R, K, 2], of key and of value memory.
    """
    total = beta.sum(1).clamp(min=MIN_BETA_SUM)
    mean = torch.einsum("rn,rncd->rcd", beta, u) / total.view(-1, 1, 1)
    errors = states.new_empty(len(plan.token), 2)
    for before, _, event in plan.schedule.spans():
        held = states[before] / z[before].view(-1, 1, 1)
        errors[event] = (held - rows(mean, plan.token[event])).square().mean(-1)
    return rows(errors, plan.write_row - plan.chains)
