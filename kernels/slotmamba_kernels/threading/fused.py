"""The mix of two slot memories in one kernel each way, as ops that torch.compile and autograd see."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from slotmamba_kernels.custom_op import custom_op
from slotmamba_kernels.hksa.slot_lists import rows_of, trimmed, united
from slotmamba_kernels.hksa.state import SlotState, SparseSlotState
from slotmamba_kernels.threading.triton_kernels import mix_backward, mix_forward

TILE = 1024  # numbers of one vector memory that a program holds: 8 a thread, of up to six such tiles
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def thread_fused(own: SlotState, below: SlotState, bias: Tensor, slope: Tensor) -> SlotState:
    """See `slotmamba_kernels.thread_slots`; the arguments are checked."""
    num_slots = own.num_slots
    if not (isinstance(own, SparseSlotState) and isinstance(below, SparseSlotState)):
        mixed = thread_slots_op(*_tensors(own.dense()), *_tensors(below.dense()), bias, slope, None, None, num_slots)
        return SlotState(*mixed)
    slots = trimmed(united(own.slots, below.slots, num_slots), num_slots)
    own_row, below_row = (rows_of(state.slots, slots, num_slots).int() for state in (own, below))
    S_k, S_v, z, surprise = thread_slots_op(
        *_tensors(own), *_tensors(below), bias, slope, own_row, below_row, num_slots
    )
    return SparseSlotState(S_k, S_v, z, surprise, slots=slots, slots_in_all=num_slots)


@custom_op("slotmamba::thread_slots")
def thread_slots_op(
    own_k: Tensor,
    own_v: Tensor,
    own_z: Tensor,
    own_surprise: Tensor,
    below_k: Tensor,
    below_v: Tensor,
    below_z: Tensor,
    below_surprise: Tensor,
    bias: Tensor,
    slope: Tensor,
    own_row: Tensor | None,
    below_row: Tensor | None,
    num_slots: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S_k, S_v, z and surprise of the mix, whose row r is mixed from these rows [B, H, R] int32 of the memories, -1 for
    an empty slot; without them the memories have the same rows. Memories in float32."""
    out = _empty_mix(own_k, own_row)
    arguments = [x.contiguous() for x in (own_k, own_v, own_z, own_surprise, below_k, below_v, below_z, below_surprise)]
    arguments += [bias.float(), slope.float()]
    launch = _Launch(own_k, below_k, own_row, num_slots)
    mix_forward[launch.grid](*arguments, own_row, below_row, *out, *launch.sizes, **launch.constants)
    return out


@custom_op("slotmamba::thread_slots_backward")
def thread_slots_backward(
    d_k: Tensor,
    d_v: Tensor,
    d_z: Tensor,
    d_surprise: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_z: Tensor,
    own_surprise: Tensor,
    below_k: Tensor,
    below_v: Tensor,
    below_z: Tensor,
    below_surprise: Tensor,
    bias: Tensor,
    slope: Tensor,
    own_row: Tensor | None,
    below_row: Tensor | None,
    num_slots: int,
) -> list[Tensor]:
    """Gradients of the first ten arguments of `thread_slots_op`, given those of its outputs."""
    memories = (own_k, own_v, own_z, own_surprise, below_k, below_v, below_z, below_surprise)
    # The mix has every row of two dense memories, but not the fillings of sparse ones.
    new = torch.empty_like if own_row is None else torch.zeros_like
    d_memories = [new(x, memory_format=torch.contiguous_format) for x in memories]
    launch = _Launch(own_k, below_k, own_row, num_slots)
    batch, heads = own_z.shape[:2]
    d_gate = own_z.new_empty(2, batch, heads, launch.grid[0])
    mix_backward[launch.grid](
        *(x.contiguous() for x in (d_k, d_v, d_z, d_surprise, *memories)), bias.float(), slope.float(),
        own_row, below_row, *d_memories, *d_gate.unbind(0), *launch.sizes, **launch.constants,
    )  # fmt: skip
    d_bias, d_slope = d_gate.sum((1, 3)).unbind(0)
    return [*d_memories, d_bias.to(bias.dtype, copy=True), d_slope.to(slope.dtype, copy=True)]


class _Launch:
    """Grid and arguments that both kernels share."""

    def __init__(self, own_k: Tensor, below_k: Tensor, own_row: Tensor | None, num_slots: int) -> None:
        batch, heads, own_rows, dim = own_k.shape
        rows = own_rows if own_row is None else own_row.shape[-1]
        block = triton.next_power_of_2(dim)
        per_program = max(TILE // block, 1)
        self.grid = (triton.cdiv(rows, per_program), batch * heads)
        self.sizes = (rows, own_rows, below_k.shape[2], 1.0 / num_slots)
        self.constants = {
            "H": heads, "D": dim, "BD": block, "ROWS": per_program, "GATHER": own_row is not None, "num_warps": 4,
        }  # fmt: skip


def _empty_mix(own_k: Tensor, own_row: Tensor | None) -> Four:
    batch, heads, rows, dim = own_k.shape
    rows = rows if own_row is None else own_row.shape[-1]
    scores, vectors = (batch, heads, rows), (batch, heads, rows, dim)
    return own_k.new_empty(vectors), own_k.new_empty(vectors), own_k.new_empty(scores), own_k.new_empty(scores)


@thread_slots_op.register_fake
def _(*arguments: Any) -> Four:
    own_k, own_row = arguments[0], arguments[10]
    return _empty_mix(own_k, own_row)


@thread_slots_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    differentiable = arguments[4:14]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in differentiable]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.num_slots = inputs[12]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return (*thread_slots_backward(*grads, *ctx.saved_tensors, ctx.num_slots), None, None, None)


thread_slots_op.register_autograd(_backward, setup_context=_save)


def _tensors(state: SlotState) -> Four:
    return state.S_k, state.S_v, state.z, state.surprise
