"""Runs HKSA's kernels on a stretch of tokens: forward from its entering memory, and backward through it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor

from slotmamba_kernels.hksa.arrays import Gradients, Inputs, Stretch, Table
from slotmamba_kernels.hksa.backward_kernels import chain_backward, entering_backward, read_backward
from slotmamba_kernels.hksa.event_plan import ceil_div
from slotmamba_kernels.hksa.forward_kernels import chain_forward, read_forward, write_log_keeps
from slotmamba_kernels.hksa.split import Split, split_long_chains
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.hksa.surprise_kernels import surprise_backward, surprise_forward
from slotmamba_kernels.hksa.token_kernels import token_backward

CHAIN_READS = 1  # of the state after a write that are loaded with it; on average there is one
LOG_KEEP_BLOCK = 1024
SURPRISE_TILE = 32  # writes of a bucket whose surprise is formed at a time
FEWEST_PROGRAMS = 4096  # below it a warp has few others to wait beside, and loads its next writes ahead


def write_forward(
    x: Inputs, at: Stretch, entering: SlotState | None, leaving: SlotState | None, num_slots: int
) -> Table:
    """Walks the writes of a stretch; the last states of chains that reach its end go into `leaving`, in place."""
    batch, length, heads, steps, writes, _, dim = x.sizes
    streams = batch * heads
    table = Table.empty(x, at.length)
    block = triton.next_power_of_2(dim)
    form_log_keeps(x, at, table)

    def walk(split: Split | None, blocks: tuple[Tensor | None, Tensor | None], probe: bool = False) -> None:
        programs = _programs(at, split, probe)
        chain_forward[(programs, streams)](
            x.k, x.u_k, x.u_v, x.beta, x.write_w, table.log_keep, x.gamma,
            at.plan.write_order, at.plan.previous, at.plan.leaving, at.plan.write_bucket, *_blocks(split),
            *_parts(entering)[:3], x.c_k, x.c_v, x.lam_k, x.lam_v,
            table.contents, table.z, table.alongs, table.errors, *_parts(leaving)[:3], *blocks,
            at.start, length, at.length, _rows(entering), _rows(leaving),
            at.plan.num_buckets, _capacity(split), 1.0 / num_slots,
            H=heads, NS=steps, K=writes, D=dim, BD=block,
            ENTERING=entering is not None, LEAVING=leaving is not None, SURPRISE=x.a_s is not None,
            INJECT=x.c_k is not None, DEPTH=_depth(streams * programs), SPLIT=split is not None, PROBE=probe,
            num_warps=1,
        )  # fmt: skip

    _walk_chains(x, at, table, walk, backward=False)
    if x.a_s is not None:
        surprise_forward[(at.plan.num_buckets, streams)](
            x.write_w, at.plan.write_order, at.plan.previous, at.plan.leaving, at.plan.write_bucket, table.errors,
            x.a_s, x.eta, _parts(entering)[3], table.surprise, _parts(leaving)[3],
            at.start, length, at.length, _rows(entering), _rows(leaving), at.plan.num_buckets,
            H=heads, K=writes, TILE=SURPRISE_TILE,
            ENTERING=entering is not None, LEAVING=leaving is not None, num_warps=1,
        )  # fmt: skip
    return table


def form_log_keeps(x: Inputs, at: Stretch, table: Table) -> None:
    """log(1 - write weight) of the stretch's writes, once for all kernels that decay by it."""
    batch, length, heads, _, writes, _, _ = x.sizes
    width = heads * writes
    write_log_keeps[(ceil_div(at.length * width, LOG_KEEP_BLOCK), batch)](
        x.write_w, table.log_keep, at.start, length, at.length, width, BLOCK=LOG_KEEP_BLOCK, num_warps=4
    )


def read_tokens(x: Inputs, at: Stretch, entering: SlotState | None, table: Table, num_slots: int, o: Tensor) -> None:
    """Reads the stretch's tokens into o [B, T, H, d]."""
    batch, length, heads, _, _, reads, dim = x.sizes
    block, width = triton.next_power_of_2(dim), triton.next_power_of_2(reads)
    read_forward[(at.length * heads, batch)](
        x.q, x.read_w, at.plan.read_source, table.contents, table.z, *_parts(entering)[:3], o,
        at.start, length, at.length, table.z.shape[1], _rows(entering), 1.0 / num_slots, dim**-0.5,
        H=heads, K=reads, BK=width, D=dim, BD=block, ENTERING=entering is not None,
        num_warps=_token_warps(width * block),
    )  # fmt: skip


def stretch_backward(
    x: Inputs,
    at: Stretch,
    entering: SlotState | None,
    table: Table,
    num_slots: int,
    d_o: Tensor,
    d_leaving: SlotState | None,
    d_entering: SlotState | None,
    grads: Gradients,
) -> None:
    """Fills the stretch's tokens of `grads` and, in place, the rows of d_entering that the stretch uses."""
    batch, length, heads, steps, writes, reads, dim = x.sizes
    streams, block, plan = batch * heads, triton.next_power_of_2(dim), at.plan
    shares, d_z_read = backward_of_reads(x, at, entering, table, num_slots, d_o, grads)
    adjoint = torch.empty_like(table.contents, dtype=x.adjoint_dtype)
    adjoint_z, pulls = torch.empty_like(table.z), torch.empty_like(table.alongs)
    adjoint_surprise = None if table.surprise is None else torch.zeros_like(table.surprise)

    def walk(split: Split | None, blocks: tuple[Tensor | None, Tensor | None], probe: bool = False) -> None:
        programs = _programs(at, split, probe)
        chain_backward[(programs, streams)](
            x.q, d_o, x.k, x.beta, x.write_w, table.log_keep, x.gamma,
            plan.write_order, plan.previous, plan.leaving, plan.write_bucket, *_blocks(split),
            plan.read_order, plan.read_range, shares, d_z_read, x.c_k, x.c_v, x.lam_k, x.lam_v,
            *_parts(d_leaving)[:3], adjoint, adjoint_z, pulls, *_parts(d_entering)[:3], *blocks,
            at.start, length, at.length, _rows(entering), _rows(d_leaving), plan.num_buckets, _capacity(split),
            H=heads, NS=steps, K=writes, KR=reads, D=dim, BD=block, READS=CHAIN_READS,
            ENTERING=entering is not None, LEAVING=d_leaving is not None, INJECT=x.c_k is not None,
            DEPTH=_depth(streams * programs), SPLIT=split is not None, PROBE=probe, num_warps=1,
        )  # fmt: skip

    _walk_chains(x, at, table, walk, backward=True)
    if adjoint_surprise is not None and d_leaving is not None:
        surprise_backward[(plan.num_buckets, streams)](
            x.write_w, plan.write_order, plan.previous, plan.leaving, plan.write_bucket, x.eta,
            d_leaving.surprise, adjoint_surprise, _parts(d_entering)[3],
            at.start, length, at.length, _rows(entering), _rows(d_leaving), plan.num_buckets,
            H=heads, K=writes, TILE=SURPRISE_TILE, ENTERING=entering is not None, num_warps=1,
        )  # fmt: skip
    if d_entering is not None:
        entering_backward[(plan.num_buckets, streams)](
            x.q, d_o, plan.read_source, plan.read_bucket, plan.read_order, shares, d_z_read,
            *_parts(d_entering)[:3], at.start, length, at.length, _rows(entering), plan.num_buckets,
            H=heads, KR=reads, D=dim, BD=block, ONE_SLOT=plan.num_buckets == num_slots, num_warps=1,
        )  # fmt: skip

    backward_of_tokens(x, at, entering, table, num_slots, (adjoint, adjoint_z, pulls, adjoint_surprise), grads)


def backward_of_reads(
    x: Inputs, at: Stretch, entering: SlotState | None, table: Table, num_slots: int, d_o: Tensor, grads: Gradients
) -> tuple[Tensor, Tensor]:
    """Fills the stretch's gradients of q and the read weights; what each read puts on the adjoint of the state that it
    saw: two factors [S, L*K', 2], of q and of d_o, and the normaliser's [S, L*K']."""
    batch, length, heads, _, _, reads, dim = x.sizes
    block, width = triton.next_power_of_2(dim), triton.next_power_of_2(reads)
    shares = torch.empty(batch * heads, at.length * reads, 2, dtype=torch.float32, device=x.q.device)
    d_z_read = torch.empty(batch * heads, at.length * reads, dtype=torch.float32, device=x.q.device)
    read_backward[(at.length * heads, batch)](
        x.q, x.read_w, at.plan.read_source, table.contents, table.z, *_parts(entering)[:3], d_o,
        grads.q, grads.read_w, shares, d_z_read,
        at.start, length, at.length, table.z.shape[1], _rows(entering), 1.0 / num_slots, dim**-0.5,
        H=heads, K=reads, BK=width, D=dim, BD=block, ENTERING=entering is not None,
        num_warps=_token_warps(width * block),
    )  # fmt: skip
    return shares, d_z_read


def backward_of_tokens(
    x: Inputs,
    at: Stretch,
    entering: SlotState | None,
    table: Table,
    num_slots: int,
    left: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grads: Gradients,
) -> None:
    """Fills the stretch's remaining `grads`. left: by the chains, adjoint, adjoint_z, pulls and adjoint_surprise."""
    batch, length, heads, steps, writes, _, dim = x.sizes
    streams = batch * heads
    head_shares = torch.empty(3, streams, at.length, dtype=torch.float32, device=x.q.device)
    token_backward[(at.length * heads, batch)](
        x.k, x.u_k, x.u_v, x.beta, x.write_w, table.log_keep, x.gamma, x.a_s, x.eta,
        at.plan.write_source, table.contents, table.z, table.alongs, table.surprise, table.errors, *_parts(entering),
        *left, x.c_k, x.c_v, x.lam_k, x.lam_v,
        grads.k, grads.u_k, grads.u_v, grads.beta, grads.write_w, *head_shares.unbind(0),
        grads.c_k, grads.c_v, grads.lam_k, grads.lam_v,
        at.start, length, at.length, _rows(entering), 1.0 / num_slots,
        H=heads, NS=steps, K=writes, D=dim, BD=triton.next_power_of_2(dim),
        ENTERING=entering is not None, SURPRISE=x.a_s is not None, INJECT=x.c_k is not None, num_warps=1,
    )  # fmt: skip
    for name, share in zip(("gamma", "a_s", "eta"), head_shares.unbind(0), strict=True):
        total = getattr(grads, name)
        if total is not None:
            total += share.view(batch, heads, at.length).sum((0, 2))


def _parts(memory: SlotState | None) -> tuple[Tensor | None, ...]:
    """The tensors of a memory as kernel arguments."""
    if memory is None:
        return None, None, None, None
    return memory.S_k, memory.S_v, memory.z, memory.surprise


def _rows(memory: SlotState | None) -> int:
    """Rows of a stream in a memory."""
    return 1 if memory is None else memory.z.shape[-1]


def _walk_chains(x: Inputs, at: Stretch, table: Table, walk: Callable[..., None], backward: bool) -> None:
    """Calls walk(split, blocks): once if no chain is split, else as a probe first."""
    split = split_long_chains(x, at, table.log_keep)
    blocks = (None, None) if split is None else split.carry(x, at, partial(walk, probe=True), backward)
    walk(split, blocks)


def _programs(at: Stretch, split: Split | None, probe: bool) -> int:
    """Of a stream, in a walk over its buckets and blocks, or as a probe over its blocks."""
    return (0 if probe else at.plan.num_buckets) + (0 if split is None else split.capacity)


def _blocks(split: Split | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if split is None else (split.block_begin, split.block_range)


def _capacity(split: Split | None) -> int:
    return 1 if split is None else split.capacity


def _depth(programs: int) -> int:
    """How many writes ahead a chain loads: several where there are few chains."""
    return 3 if programs < FEWEST_PROGRAMS else 0


def _token_warps(elements: int) -> int:
    """Warps of a program that holds several tiles of so many elements: 32 of each a thread."""
    return min(8, max(1, elements // 1024))
