"""A layer's slot memory over all segments of a row, as one op that autograd and torch.compile see."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from slotmamba_kernels.custom_op import custom_op
from slotmamba_kernels.hksa.arguments import Surprise
from slotmamba_kernels.hksa.arrays import Gradients, Inputs, Stretch, Table
from slotmamba_kernels.hksa.event_plan import EventPlan, make_event_plan
from slotmamba_kernels.hksa.launch import (
    CHAIN_READS,
    backward_of_reads,
    backward_of_tokens,
    form_log_keeps,
    read_tokens,
)
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.hksa.triton_op import PLAN_TENSORS, by_argument, present, state_tensors
from slotmamba_kernels.threading.threaded_kernels import threaded_backward, threaded_forward

Gate = tuple[Tensor, Tensor]

STATE_TENSORS = 4


def threaded_triton(
    named: dict[str, Tensor],
    *,
    num_slots: int,
    segment_len: int,
    surprise: Surprise,
    gate: Gate | None,
    below: SlotState | None,
    state: SlotState | None,
    doc_start: Tensor | None,
) -> tuple[Tensor, SlotState]:
    """o [B, T, H, d] and the memories at the ends of the N segments, each tensor [B, N, H, M(, d)], as are those of
    `below`; the arguments are checked, T is N times segment_len, memories are dense."""
    bias, slope = gate or (None, None)
    absent = (None,) * STATE_TENSORS
    results = threaded_op(
        *named.values(), *surprise, bias, slope,
        *(absent if below is None else state_tensors(below)),
        *(absent if state is None else (part.float() for part in state_tensors(state))),
        doc_start, num_slots, segment_len,
    )  # fmt: skip
    return results[0], SlotState(*results[1 : 1 + STATE_TENSORS])


DIFFERENTIABLE = (
    "q", "k", "u_k", "u_v", "beta", "write_w", "read_w", "gamma", "a_s", "eta", "bias", "slope",
    "below_k", "below_v", "below_z", "below_surprise", "S_k", "S_v", "z", "surprise",
)  # fmt: skip
ARGUMENTS = (
    "q", "k", "u_k", "u_v", "beta", "write_idx", "write_w", "read_idx", "read_w", "gamma", *DIFFERENTIABLE[8:],
    "doc_start", "num_slots", "segment_len",
)  # fmt: skip


@custom_op("slotmamba::hksa_threaded")
def threaded_op(
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
    a_s: Tensor,
    eta: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    below_k: Tensor | None,
    below_v: Tensor | None,
    below_z: Tensor | None,
    below_surprise: Tensor | None,
    S_k: Tensor | None,
    S_v: Tensor | None,
    z: Tensor | None,
    surprise: Tensor | None,
    doc_start: Tensor | None,
    num_slots: int,
    segment_len: int,
) -> list[Tensor]:
    """o; the memories at the segments' ends; what `threaded_backward_op` needs: the plan, the memories that segments
    begin with and the table."""
    x = _inputs(segment_len, q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta)
    sequences, length, heads, steps, writes, _, dim = x.sizes
    documents = _documents(doc_start, segment_len)
    plan = make_event_plan(
        _segments(write_idx.int(), segment_len), _segments(read_idx.int(), segment_len), num_slots,
        doc_start=documents, bucket_per_slot=True,
    )  # fmt: skip
    at = Stretch(0, length, plan)
    begun, ends = (_memories(x, num_slots, len(q)) for _ in range(2))
    table = Table.empty(x, length)
    form_log_keeps(x, at, table)
    threaded_forward[(num_slots, len(q) * heads)](
        x.k, x.u_k, x.u_v, x.beta, x.write_w, table.log_keep, x.gamma, x.a_s, x.eta, *_gate(bias, slope),
        plan.write_order, plan.previous, plan.leaving, plan.write_bucket, _continues(documents),
        *_contiguous(S_k, S_v, z, surprise), *_contiguous(below_k, below_v, below_z, below_surprise),
        *state_tensors(begun), *state_tensors(ends),
        table.contents, table.z, table.alongs, table.errors, table.surprise,
        length, sequences // len(q), num_slots, 1.0 / num_slots,
        H=heads, NS=steps, K=writes, D=dim, BD=triton.next_power_of_2(dim),
        STATE=z is not None, GATE=bias is not None, DOCUMENTS=doc_start is not None, num_warps=1,
    )  # fmt: skip
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    entering = begun.map(lambda part: part.flatten(0, 1))
    read_tokens(x, at, entering, table, num_slots, o)
    return [o, *state_tensors(ends), *plan.tensors(), *state_tensors(begun), *vars(table).values()]


@custom_op("slotmamba::hksa_threaded_backward")
def threaded_backward_op(
    d_o: Tensor,
    d_end_k: Tensor | None,
    d_end_v: Tensor | None,
    d_end_z: Tensor | None,
    d_end_surprise: Tensor | None,
    ends: list[Tensor],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_w: Tensor,
    read_w: Tensor,
    gamma: Tensor,
    a_s: Tensor,
    eta: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    below_k: Tensor | None,
    below_v: Tensor | None,
    below_z: Tensor | None,
    below_surprise: Tensor | None,
    S_k: Tensor | None,
    S_v: Tensor | None,
    z: Tensor | None,
    surprise: Tensor | None,
    doc_start: Tensor | None,
    num_slots: int,
    segment_len: int,
) -> list[Tensor]:
    """Gradients of the DIFFERENTIABLE, empty for those that are absent."""
    x = _inputs(segment_len, q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta)
    sequences, length, heads, steps, writes, reads, dim = x.sizes
    batch, streams, device = len(q), len(q) * heads, q.device
    at = Stretch(0, length, EventPlan(*saved[:PLAN_TENSORS]))
    entering = SlotState(*(part.flatten(0, 1) for part in saved[PLAN_TENSORS : PLAN_TENSORS + STATE_TENSORS]))
    table = Table(*saved[PLAN_TENSORS + STATE_TENSORS :])
    grads = Gradients.empty(x)
    d_o = _segments(d_o, segment_len)
    shares, d_z_read = backward_of_reads(x, at, entering, table, num_slots, d_o, grads)
    d_ends = _d_ends((d_end_k, d_end_v, d_end_z, d_end_surprise), ends)
    adjoint = torch.empty_like(table.contents, dtype=x.adjoint_dtype)
    adjoint_z, adjoint_surprise, pulls = (torch.empty_like(each) for each in (table.z, table.z, table.alongs))
    d_state = [None if part is None else torch.empty_like(part) for part in _contiguous(S_k, S_v, z, surprise)]
    below = _contiguous(below_k, below_v, below_z, below_surprise)
    d_below = [None if part is None else torch.empty_like(part) for part in below]
    d_gate = torch.empty(2, sequences, heads, num_slots, device=device).unbind(0) if bias is not None else (None, None)
    plan = at.plan
    threaded_backward[(num_slots, streams)](
        x.q, d_o, x.k, x.beta, x.write_w, table.log_keep, x.gamma, x.eta, *_gate(bias, slope),
        plan.write_order, plan.previous, plan.leaving, plan.write_bucket,
        _continues(_documents(doc_start, segment_len)),
        plan.read_order, plan.read_bucket, plan.read_range, plan.read_source, shares, d_z_read,
        *below, *ends, *d_ends, adjoint, adjoint_z, adjoint_surprise, pulls, *d_state, *d_below, *d_gate,
        length, sequences // batch, num_slots,
        H=heads, NS=steps, K=writes, KR=reads, D=dim, BD=triton.next_power_of_2(dim), READS=CHAIN_READS,
        STATE=z is not None, GATE=bias is not None, DOCUMENTS=doc_start is not None, ENDS=d_ends[0] is not None,
        num_warps=1,
    )  # fmt: skip
    backward_of_tokens(x, at, entering, table, num_slots, (adjoint, adjoint_z, pulls, adjoint_surprise), grads)
    d_parameters = [None if share is None else share.sum((0, 2)) for share in d_gate]
    results = [*list(vars(grads).values())[:10], *d_parameters, *d_below, *d_state]
    given = (
        q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta, bias, slope,
        below_k, below_v, below_z, below_surprise, S_k, S_v, z, surprise,
    )  # fmt: skip
    return present(results, given)


@threaded_op.register_fake
def _results(*arguments: Any) -> list[Tensor]:
    named = dict(zip(ARGUMENTS, arguments, strict=True))
    x = _inputs(named["segment_len"], *(named[name] for name in DIFFERENTIABLE[:10]))
    sequences, length, heads, _, writes, reads, _ = x.sizes
    num_slots, q = named["num_slots"], named["q"]
    plan = EventPlan.empty(sequences, length, heads, writes, reads, num_slots, q.device, bucket_per_slot=True)
    entering, ends = (state_tensors(_memories(x, num_slots, len(q))) for _ in range(2))
    table = Table.empty(x, length)
    return [
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        *ends,
        *plan.tensors(),
        *entering,
        *vars(table).values(),
    ]


@threaded_backward_op.register_fake
def _backward_results(*arguments: Any) -> list[Tensor]:
    *given, _, _, _ = arguments[7:]
    return [given[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(named[name] for name in DIFFERENTIABLE), named["doc_start"], *output[1:])
    ctx.num_slots, ctx.segment_len = named["num_slots"], named["segment_len"]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    *given, doc_start = kept[: len(DIFFERENTIABLE) + 1]
    ends = list(kept[len(DIFFERENTIABLE) + 1 :][:STATE_TENSORS])
    saved = list(kept[len(DIFFERENTIABLE) + 1 + STATE_TENSORS :])
    d_o = grads[0] if grads[0] is not None else torch.zeros_like(given[0])
    results = threaded_backward_op(
        d_o, *grads[1 : 1 + STATE_TENSORS], ends, saved, *given, doc_start, ctx.num_slots, ctx.segment_len
    )
    return by_argument(results, given, DIFFERENTIABLE, ARGUMENTS)


threaded_op.register_autograd(_differentiate, setup_context=_save)


def _segments(x: Tensor, segment_len: int) -> Tensor:
    """x [B, T, ...] as [B*N, segment_len, ...], contiguous."""
    return x.contiguous().view(-1, segment_len, *x.shape[2:])


def _inputs(segment_len: int, *tensors: Tensor) -> Inputs:
    """Of the segments as sequences of their own; the first seven tensors go by token."""
    per_token = [_segments(x, segment_len) for x in tensors[:7]]
    return Inputs(*per_token, *(x.contiguous() for x in tensors[7:]), None, None, None, None)  # type: ignore[call-arg]


def _documents(doc_start: Tensor | None, segment_len: int) -> Tensor | None:
    """doc_start [B, T] counted from the first token of each segment, [B*N, segment_len]."""
    if doc_start is None:
        return None
    first = torch.arange(0, doc_start.shape[1], segment_len, device=doc_start.device)
    return (doc_start.unflatten(1, (-1, segment_len)) - first.view(1, -1, 1)).flatten(0, 1)


def _continues(documents: Tensor | None) -> Tensor | None:
    """int32 [B*N]: whether the document alive at a segment's end began before the segment."""
    return None if documents is None else (documents[:, -1] < 0).int()


def _memories(x: Inputs, num_slots: int, batch: int) -> SlotState:
    """Memories [B, N, H, M(, d)] that say nothing yet, for each segment."""
    sequences, _, heads, _, _, _, dim = x.sizes
    scores = (batch, sequences // batch, heads, num_slots)
    return SlotState(
        *(torch.empty(shape, device=x.q.device) for shape in ((*scores, dim), (*scores, dim), scores, scores))
    )


def _gate(bias: Tensor | None, slope: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if bias is None else bias.float(), None if slope is None else slope.float()


def _contiguous(*parts: Tensor | None) -> list[Tensor | None]:
    return [None if part is None else part.contiguous() for part in parts]


def _d_ends(given: tuple[Tensor | None, ...], ends: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the memories at the segments' ends, zeros for parts that nothing depends on, None if nothing
    depends on any."""
    if all(part is None for part in given):
        return [None] * STATE_TENSORS
    return [torch.zeros_like(end) if part is None else part.contiguous() for part, end in zip(given, ends, strict=True)]
