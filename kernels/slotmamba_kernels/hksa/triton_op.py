"""HKSA on Triton kernels, as ops that autograd, autocast, torch.compile and activation checkpointing see.

The sequence is run in stretches of tokens, each from the memory that the one before it left. What a stretch's kernels
leave for the backward pass, mostly what every slot held after every write, is kept, or made again there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slotmamba_kernels.custom_op import custom_op
from slotmamba_kernels.hksa.arguments import Inject, Surprise
from slotmamba_kernels.hksa.arrays import Gradients, Inputs, Stretch, Table
from slotmamba_kernels.hksa.carry import Memory, carried, carried_back, leaving_rows, leaving_slots
from slotmamba_kernels.hksa.event_plan import EventPlan, make_event_plan
from slotmamba_kernels.hksa.launch import read_tokens, stretch_backward, write_forward
from slotmamba_kernels.hksa.state import DENSE_SLOTS, MAX_OFFSET, SlotState, SparseSlotState

LOCKSTEP_TOKENS = 32768
"""Longer stretches are slower: their chains drift apart, and the vectors that they share leave the L2 cache."""

RECOMPUTED_BYTES = 2**29  # of the tables of a stretch when they are made again in the backward pass
PLAN_TENSORS = 9
MEMORY_TENSORS = 5  # S_k, S_v, z, surprise, slots
TABLE_TENSORS = 6
STRETCH_TENSORS = PLAN_TENSORS + MEMORY_TENSORS + TABLE_TENSORS


def hksa_triton(
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
    num_slots: int,
    state: SlotState | None,
    doc_start: Tensor | None,
    surprise: Surprise | None,
    inject: Inject | None,
    recompute: bool,
    return_state: bool,
) -> tuple[Tensor, SlotState | None]:
    """See `slotmamba_kernels.hksa`; the arguments are checked and as the caller gave them."""
    a_s, eta = surprise or (None, None)
    c_k, c_v, lam_k, lam_v = inject or (None, None, None, None)
    slots = state.slots if isinstance(state, SparseSlotState) else None
    entering = (None, None, None, None) if state is None else tuple(x.float() for x in state_tensors(state))
    results = hksa_forward(
        q, k, u_k, u_v, beta, write_idx, write_w, read_idx, read_w, gamma,
        a_s, eta, c_k, c_v, lam_k, lam_v, *entering, slots, doc_start, num_slots, recompute, return_state,
    )  # fmt: skip
    if not return_state:
        return results[0], None
    o, S_k, S_v, z, score, left = results[:6]
    if _leaves_sparse(state is not None, slots, num_slots):
        return o, SparseSlotState(S_k, S_v, z, score, slots=left, slots_in_all=num_slots)
    return o, SlotState(S_k, S_v, z, score)


@custom_op("slotmamba::hksa_forward")
def hksa_forward(
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
    a_s: Tensor | None,
    eta: Tensor | None,
    c_k: Tensor | None,
    c_v: Tensor | None,
    lam_k: Tensor | None,
    lam_v: Tensor | None,
    S_k: Tensor | None,
    S_v: Tensor | None,
    z: Tensor | None,
    surprise: Tensor | None,
    slots: Tensor | None,
    doc_start: Tensor | None,
    num_slots: int,
    recompute: bool,
    return_state: bool,
) -> list[Tensor]:
    """o; the leaving S_k, S_v, z, surprise and slots (empty when dense, all empty without return_state); what
    `hksa_backward` needs, by stretch."""
    x = _inputs(q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta, c_k, c_v, lam_k, lam_v)
    write_idx, read_idx = write_idx.int().contiguous(), read_idx.int().contiguous()
    doc_start = None if doc_start is None else doc_start.contiguous()
    memory = _memory(S_k, S_v, z, surprise, slots)
    sparse = _leaves_sparse(memory is not None, slots, num_slots)
    o = torch.empty_like(x.q)
    saved: list[Tensor] = []
    for start, length in _stretches(x, recompute, sparse):
        continues = _continues(doc_start, start, length, q)
        plan = make_event_plan(
            write_idx, read_idx, num_slots, start=start, length=length, doc_start=doc_start, **_entering(memory)
        )
        entering = None if memory is None else memory.state
        left_slots, leaving = None, None
        leaves = return_state or start + length < q.shape[1]
        if leaves and sparse:
            left_slots = leaving_slots(plan.leaving, None if memory is None else memory.slots, continues, num_slots)
            plan = plan.with_leaving(leaving_rows(plan.leaving, left_slots, num_slots))
        if leaves:
            leaving = carried(memory, continues, left_slots, q, num_slots)
        at = Stretch(start, length, plan)
        table = write_forward(x, at, entering, leaving, num_slots)
        read_tokens(x, at, entering, table, num_slots, o)
        saved += [*plan.tensors(), *_memory_tensors(memory if start else None, q)]
        saved += _table_tensors(None if recompute else table, q)
        memory = None if leaving is None else Memory(leaving, left_slots)
    return [o, *_memory_tensors(memory, q), *saved]


@custom_op("slotmamba::hksa_backward")
def hksa_backward(
    d_o: Tensor,
    d_S_k: Tensor | None,
    d_S_v: Tensor | None,
    d_z: Tensor | None,
    d_surprise: Tensor | None,
    left_slots: Tensor,
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_w: Tensor,
    read_w: Tensor,
    gamma: Tensor,
    a_s: Tensor | None,
    eta: Tensor | None,
    c_k: Tensor | None,
    c_v: Tensor | None,
    lam_k: Tensor | None,
    lam_v: Tensor | None,
    S_k: Tensor | None,
    S_v: Tensor | None,
    z: Tensor | None,
    surprise: Tensor | None,
    slots: Tensor | None,
    doc_start: Tensor | None,
    num_slots: int,
    recompute: bool,
) -> list[Tensor]:
    """Gradients of q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta, c_k, c_v, lam_k, lam_v, S_k, S_v, z and
    surprise, empty for those that are absent."""
    x = _inputs(q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta, c_k, c_v, lam_k, lam_v)
    grads = Gradients.empty(x)
    d_o = d_o.contiguous()
    stretches = list(_stretches(x, recompute, _leaves_sparse(S_k is not None, slots, num_slots)))
    d_memory = _d_memory((d_S_k, d_S_v, d_z, d_surprise), left_slots, q, num_slots)
    for number in reversed(range(len(stretches))):
        start, length = stretches[number]
        continues = _continues(doc_start, start, length, q)
        kept = saved[number * STRETCH_TENSORS : (number + 1) * STRETCH_TENSORS]
        at, memory, table = _unpacked(kept, start, length, recompute)
        if start == 0:
            memory = _memory(S_k, S_v, z, surprise, slots)
        entering = None if memory is None else memory.state
        if table is None:
            table = write_forward(x, at, entering, None, num_slots)
        d_entering = None
        if memory is not None and entering is not None:
            if d_memory is None:
                d_entering = SlotState(*(torch.zeros_like(part) for part in state_tensors(entering)))
            else:
                d_entering = carried_back(d_memory, continues, memory.slots, num_slots)
        d_leaving = None if d_memory is None else d_memory.state
        stretch_backward(x, at, entering, table, num_slots, d_o, d_leaving, d_entering, grads)
        d_memory = None if memory is None or d_entering is None else Memory(d_entering, memory.slots)
    d_state = (None,) * 4 if d_memory is None else state_tensors(d_memory.state)
    given = (q, k, u_k, u_v, beta, write_w, read_w, gamma, a_s, eta, c_k, c_v, lam_k, lam_v, S_k, S_v, z, surprise)
    return present((*vars(grads).values(), *d_state), given)


DIFFERENTIABLE = (
    "q", "k", "u_k", "u_v", "beta", "write_w", "read_w", "gamma", "a_s", "eta", "c_k", "c_v", "lam_k", "lam_v",
    "S_k", "S_v", "z", "surprise",
)  # fmt: skip
ARGUMENTS = (
    "q", "k", "u_k", "u_v", "beta", "write_idx", "write_w", "read_idx", "read_w", "gamma", *DIFFERENTIABLE[8:],
    "slots", "doc_start", "num_slots", "recompute", "return_state",
)  # fmt: skip


@hksa_forward.register_fake
def _forward_results(*arguments: Any) -> list[Tensor]:
    """What `hksa_forward` returns, without values: for torch.compile and others that have none."""
    named = dict(zip(ARGUMENTS, arguments, strict=True))
    q, slots, num_slots, recompute = (named[name] for name in ("q", "slots", "num_slots", "recompute"))
    x = _inputs(*(named[name] for name in DIFFERENTIABLE[:14]))
    batch, tokens, heads, _, writes, reads, _ = x.sizes
    memory = _memory(*(named[name] for name in (*DIFFERENTIABLE[14:], "slots")))
    sparse = _leaves_sparse(memory is not None, slots, num_slots)
    saved: list[Tensor] = []
    for start, length in _stretches(x, recompute, sparse):
        continues = _continues(named["doc_start"], start, length, q)
        plan = EventPlan.empty(batch, length, heads, writes, reads, num_slots, q.device)
        saved += [*plan.tensors(), *_memory_tensors(memory if start else None, q)]
        saved += _table_tensors(None if recompute else Table.empty(x, length), q)
        left_slots = None
        if sparse:
            left_slots = leaving_slots(plan.leaving, None if memory is None else memory.slots, continues, num_slots)
        leaves = named["return_state"] or start + length < tokens
        memory = Memory(carried(memory, continues, left_slots, q, num_slots), left_slots) if leaves else None
    return [torch.empty_like(x.q), *_memory_tensors(memory, q), *saved]


@hksa_backward.register_fake
def _backward_results(*arguments: Any) -> list[Tensor]:
    *given, _, _, _, _ = arguments[7:]
    return [_absent(given[0]) if x is None else torch.empty_like(x.contiguous()) for x in given]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(named[name] for name in DIFFERENTIABLE), named["slots"], named["doc_start"], output[5], *output[6:]
    )
    ctx.num_slots, ctx.recompute, ctx.left = named["num_slots"], named["recompute"], named["return_state"]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    *given, slots, doc_start, left_slots = kept[: len(DIFFERENTIABLE) + 3]
    saved = list(kept[len(DIFFERENTIABLE) + 3 :])
    d_o = grads[0] if grads[0] is not None else torch.zeros_like(given[0])
    d_left = grads[1:5] if ctx.left else (None,) * 4  # of tensors that are empty
    results = hksa_backward(d_o, *d_left, left_slots, saved, *given, slots, doc_start, ctx.num_slots, ctx.recompute)
    return by_argument(results, given, DIFFERENTIABLE, ARGUMENTS)


hksa_forward.register_autograd(_differentiate, setup_context=_save)


def present(grads: Iterable[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients as an op returns them: in the dtype and shape of what was given, empty for what was not."""
    q = given[0]
    assert q is not None
    return [
        _absent(q) if like is None or grad is None else grad.to(like.dtype).view(like.shape)
        for grad, like in zip(grads, given, strict=True)
    ]


def by_argument(
    grads: Sequence[Tensor], given: Sequence[Tensor | None], names: Sequence[str], arguments: Sequence[str]
) -> tuple[Tensor | None, ...]:
    """The gradients of tensors of these names, as autograd wants them: for each argument, None for what was absent."""
    found = {name: grad for name, grad, x in zip(names, grads, given, strict=True) if x is not None}
    return tuple(found.get(name) for name in arguments)


def state_tensors(state: SlotState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return state.S_k, state.S_v, state.z, state.surprise


def _inputs(*tensors: Tensor | None) -> Inputs:
    return Inputs(*(None if x is None else x.contiguous() for x in tensors))  # type: ignore[arg-type]


def _memory(
    S_k: Tensor | None, S_v: Tensor | None, z: Tensor | None, surprise: Tensor | None, slots: Tensor | None
) -> Memory | None:
    if S_k is None or S_v is None or z is None or surprise is None:
        return None
    state = SlotState(S_k.contiguous(), S_v.contiguous(), z.contiguous(), surprise.contiguous())
    return Memory(state, None if slots is None else slots.contiguous())


def _d_memory(given: tuple[Tensor | None, ...], left_slots: Tensor, q: Tensor, num_slots: int) -> Memory | None:
    """Gradient of the leaving memory, zeros for parts that nothing depends on; None if nothing depends on any."""
    if all(x is None for x in given):
        return None
    slots = left_slots if left_slots.numel() else None
    batch, _, heads, dim = q.shape
    scores = (batch, heads, num_slots if slots is None else slots.shape[-1])
    parts = [
        q.new_zeros(shape, dtype=torch.float32) if x is None else x.contiguous()
        for x, shape in zip(given, ((*scores, dim), (*scores, dim), scores, scores), strict=True)
    ]
    return Memory(SlotState(*parts), slots)


def _leaves_sparse(entered: bool, slots: Tensor | None, num_slots: int) -> bool:
    return slots is not None or (not entered and num_slots > DENSE_SLOTS)


def _stretches(x: Inputs, recompute: bool, sparse: bool) -> Iterator[tuple[int, int]]:
    """(start, length) of each stretch of tokens: as long as offsets within a stream fit 32 bits, shorter when tables
    are made again in the backward pass, and unless handing on a sparse memory would cost more, where that is faster."""
    batch, length, heads, steps, writes, _, dim = x.sizes
    size = MAX_OFFSET // (max(writes * 2, heads * steps) * dim)
    if recompute:
        size = min(size, RECOMPUTED_BYTES // (batch * heads * writes * 2 * dim * x.q.element_size()))
    if not sparse:
        size = min(size, LOCKSTEP_TOKENS)
    size = max(1, min(size, length))
    for start in range(0, length, size):
        yield start, min(size, length - start)


def _continues(doc_start: Tensor | None, start: int, length: int, q: Tensor) -> Tensor:
    """bool [B]: whether the document alive at the stretch's end began before the stretch."""
    if doc_start is None:
        return torch.ones(len(q), dtype=torch.bool, device=q.device)
    return doc_start[:, start + length - 1] < start


def _absent(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


def _memory_tensors(memory: Memory | None, q: Tensor) -> list[Tensor]:
    if memory is None:
        return [_absent(q) for _ in range(MEMORY_TENSORS)]
    slots = q.new_empty(0, dtype=torch.int32) if memory.slots is None else memory.slots
    return [*state_tensors(memory.state), slots]


def _table_tensors(table: Table | None, q: Tensor) -> list[Tensor]:
    parts = (None,) * TABLE_TENSORS if table is None else vars(table).values()
    return [_absent(q) if x is None else x for x in parts]


def _unpacked(
    kept: list[Tensor], start: int, length: int, recompute: bool
) -> tuple[Stretch, Memory | None, Table | None]:
    """A stretch, the memory that entered it (None for the first) and its table (None when it is to be made again)."""
    plan = EventPlan(*kept[:PLAN_TENSORS])
    S_k, S_v, z, surprise, slots = kept[PLAN_TENSORS : PLAN_TENSORS + MEMORY_TENSORS]
    contents, z_after, alongs, log_keep, surprise_after, errors = kept[PLAN_TENSORS + MEMORY_TENSORS :]
    memory = Memory(SlotState(S_k, S_v, z, surprise), slots if slots.numel() else None) if start else None
    table = None
    if not recompute:
        with_surprise = surprise_after.numel() > 0
        scores = (surprise_after, errors) if with_surprise else (None, None)
        table = Table(contents, z_after, alongs, log_keep, *scores)
    return Stretch(start, length, plan), memory, table


def _entering(memory: Memory | None) -> dict[str, Any]:
    """What the plan wants to know of the memory that enters a stretch."""
    if memory is None:
        return {"entering": "none"}
    if memory.slots is None:
        return {"entering": "dense"}
    return {"entering": "sparse", "entering_slots": memory.slots.flatten(0, 1)}
