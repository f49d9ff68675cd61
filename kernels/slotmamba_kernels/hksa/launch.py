"""Runs HKSA's kernels on a stretch of tokens: forward from its entering memory, and backward through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from slotmamba_kernels.hksa.backward_kernels import chain_backward, entering_backward, read_backward
from slotmamba_kernels.hksa.event_plan import EventPlan
from slotmamba_kernels.hksa.forward_kernels import chain_forward, read_forward, write_log_keeps
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.hksa.surprise_kernels import surprise_backward, surprise_forward
from slotmamba_kernels.hksa.token_kernels import token_backward

CHAIN_READS = 1  # of the state after a write that are loaded with it; on average there is one
LOG_KEEP_BLOCK = 1024
SURPRISE_TILE = 32  # writes of a bucket whose surprise is formed at a time
FEWEST_PROGRAMS = 4096  # below it a program takes fewer chains, so that the GPU has enough of them


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, contiguous; None where an optional argument is absent. Shapes as in `hksa`."""

    q: Tensor
    k: Tensor
    u_k: Tensor
    u_v: Tensor
    beta: Tensor
    write_w: Tensor
    read_w: Tensor
    gamma: Tensor
    a_s: Tensor | None
    eta: Tensor | None
    c_k: Tensor | None
    c_v: Tensor | None
    lam_k: Tensor | None
    lam_v: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, T, H, n, K of writes, K of reads, d."""
        batch, length, heads, steps, dim = self.k.shape
        return batch, length, heads, steps, self.write_w.shape[-1], self.read_w.shape[-1], dim

    @property
    def table_dtype(self) -> torch.dtype:
        """In which states and adjoints wait in memory between two kernels; arithmetic is float32."""
        return self.q.dtype

    @property
    def adjoint_dtype(self) -> torch.dtype:
        # Adjoints of half-precision inputs may lie below what float16 can hold.
        return torch.bfloat16 if self.q.dtype == torch.float16 else self.q.dtype


@dataclass(frozen=True)
class Stretch:
    """Tokens [start, start + length) of a call and the plan of their writes and reads."""

    start: int
    length: int
    plan: EventPlan


@dataclass(frozen=True)
class Table:
    """What the slots hold after each write of a stretch of L tokens, S = B*H streams.

    contents: [S, L*K, 2, d] S/z of key and value memory; z: [S, L*K]; alongs: [S, L*K, n, 2] k_j . S before each step;
    with surprise its value after the write [S, L*K] and the prediction errors [S, L*K, 2], else None.
    """

    contents: Tensor
    z: Tensor
    alongs: Tensor
    log_keep: Tensor
    surprise: Tensor | None
    errors: Tensor | None

    @classmethod
    def empty(cls, x: Inputs, length: int) -> Table:
        batch, _, heads, steps, writes, _, dim = x.sizes
        scores, device = (batch * heads, length * writes), x.q.device
        return cls(
            contents=torch.empty(*scores, 2, dim, dtype=x.table_dtype, device=device),
            z=torch.empty(scores, dtype=torch.float32, device=device),
            alongs=torch.empty(*scores, steps, 2, dtype=torch.float32, device=device),
            log_keep=torch.empty(batch, length, heads, writes, dtype=torch.float32, device=device),
            surprise=None if x.a_s is None else torch.empty(scores, dtype=torch.float32, device=device),
            errors=None if x.a_s is None else torch.empty(*scores, 2, dtype=torch.float32, device=device),
        )


@dataclass
class Gradients:
    """Of the tensors of `Inputs`, of the same names; those of gamma, a_s and eta add up over stretches."""

    q: Tensor
    k: Tensor
    u_k: Tensor
    u_v: Tensor
    beta: Tensor
    write_w: Tensor
    read_w: Tensor
    gamma: Tensor
    a_s: Tensor | None
    eta: Tensor | None
    c_k: Tensor | None
    c_v: Tensor | None
    lam_k: Tensor | None
    lam_v: Tensor | None

    @classmethod
    def empty(cls, x: Inputs) -> Gradients:
        float32 = torch.float32
        return cls(
            q=torch.empty_like(x.q), k=torch.empty_like(x.k), u_k=torch.empty_like(x.u_k),
            u_v=torch.empty_like(x.u_v), beta=torch.empty_like(x.beta, dtype=float32),
            write_w=torch.empty_like(x.write_w, dtype=float32), read_w=torch.empty_like(x.read_w, dtype=float32),
            gamma=torch.zeros_like(x.gamma, dtype=float32),
            a_s=None if x.a_s is None else torch.zeros_like(x.a_s, dtype=float32),
            eta=None if x.eta is None else torch.zeros_like(x.eta, dtype=float32),
            c_k=None if x.c_k is None else torch.empty_like(x.c_k),
            c_v=None if x.c_v is None else torch.empty_like(x.c_v),
            lam_k=None if x.lam_k is None else torch.empty_like(x.lam_k, dtype=float32),
            lam_v=None if x.lam_v is None else torch.empty_like(x.lam_v, dtype=float32),
        )  # fmt: skip


def write_forward(
    x: Inputs, at: Stretch, entering: SlotState | None, leaving: SlotState | None, num_slots: int
) -> Table:
    """Walks the writes of a stretch; the last states of chains that reach its end go into `leaving`, in place."""
    batch, length, heads, steps, writes, _, dim = x.sizes
    streams = batch * heads
    table = Table.empty(x, at.length)
    block = triton.next_power_of_2(dim)
    width = heads * writes
    write_log_keeps[(_ceil(at.length * width, LOG_KEEP_BLOCK), batch)](
        x.write_w, table.log_keep, at.start, length, at.length, width, BLOCK=LOG_KEEP_BLOCK, num_warps=4
    )
    chain_forward[(at.plan.num_buckets, streams)](
        x.k, x.u_k, x.u_v, x.beta, x.write_w, table.log_keep, x.gamma,
        at.plan.write_order, at.plan.previous, at.plan.leaving, at.plan.write_bucket,
        *_parts(entering)[:3], x.c_k, x.c_v, x.lam_k, x.lam_v,
        table.contents, table.z, table.alongs, table.errors, *_parts(leaving)[:3],
        at.start, length, at.length, _rows(entering), _rows(leaving), at.plan.num_buckets, 1.0 / num_slots,
        H=heads, NS=steps, K=writes, D=dim, BD=block,
        ENTERING=entering is not None, LEAVING=leaving is not None,
        SURPRISE=x.a_s is not None, INJECT=x.c_k is not None, DEPTH=_depth(streams * at.plan.num_buckets), num_warps=1,
    )  # fmt: skip
    if x.a_s is not None:
        surprise_forward[(at.plan.num_buckets, streams)](
            x.write_w, at.plan.write_order, at.plan.previous, at.plan.leaving, at.plan.write_bucket, table.errors,
            x.a_s, x.eta, _parts(entering)[3], table.surprise, _parts(leaving)[3],
            at.start, length, at.length, _rows(entering), _rows(leaving), at.plan.num_buckets,
            H=heads, K=writes, TILE=SURPRISE_TILE,
            ENTERING=entering is not None, LEAVING=leaving is not None, num_warps=1,
        )  # fmt: skip
    return table


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
    streams, device = batch * heads, x.q.device
    block, empty_z = triton.next_power_of_2(dim), 1.0 / num_slots
    width = triton.next_power_of_2(reads)
    plan, memory = at.plan, _parts(entering)
    shares = torch.empty(streams, at.length * reads, 2, dtype=torch.float32, device=device)
    d_z_read = torch.empty(streams, at.length * reads, dtype=torch.float32, device=device)
    read_backward[(at.length * heads, batch)](
        x.q, x.read_w, plan.read_source, table.contents, table.z, *memory[:3], d_o,
        grads.q, grads.read_w, shares, d_z_read,
        at.start, length, at.length, table.z.shape[1], _rows(entering), empty_z, dim**-0.5,
        H=heads, K=reads, BK=width, D=dim, BD=block, ENTERING=entering is not None,
        num_warps=_token_warps(width * block),
    )  # fmt: skip

    adjoint = torch.empty_like(table.contents, dtype=x.adjoint_dtype)
    adjoint_z, pulls = torch.empty_like(table.z), torch.empty_like(table.alongs)
    adjoint_surprise = None if table.surprise is None else torch.zeros_like(table.surprise)
    chain_backward[(plan.num_buckets, streams)](
        x.q, d_o, x.k, x.beta, x.write_w, table.log_keep, x.gamma,
        plan.write_order, plan.previous, plan.leaving, plan.write_bucket, plan.read_order, plan.read_range,
        shares, d_z_read, x.c_k, x.c_v, x.lam_k, x.lam_v,
        *_parts(d_leaving)[:3], adjoint, adjoint_z, pulls, *_parts(d_entering)[:3],
        at.start, length, at.length, _rows(entering), _rows(d_leaving), plan.num_buckets,
        H=heads, NS=steps, K=writes, KR=reads, D=dim, BD=block, READS=CHAIN_READS,
        ENTERING=entering is not None, LEAVING=d_leaving is not None, INJECT=x.c_k is not None,
        DEPTH=_depth(streams * plan.num_buckets), num_warps=1,
    )  # fmt: skip
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

    head_shares = torch.empty(3, streams, at.length, dtype=torch.float32, device=device)
    token_backward[(at.length * heads, batch)](
        x.k, x.u_k, x.u_v, x.beta, x.write_w, table.log_keep, x.gamma, x.a_s, x.eta,
        plan.write_source, table.contents, table.z, table.alongs, table.surprise, table.errors, *memory,
        adjoint, adjoint_z, pulls, adjoint_surprise, x.c_k, x.c_v, x.lam_k, x.lam_v,
        grads.k, grads.u_k, grads.u_v, grads.beta, grads.write_w, *head_shares.unbind(0),
        grads.c_k, grads.c_v, grads.lam_k, grads.lam_v,
        at.start, length, at.length, _rows(entering), empty_z,
        H=heads, NS=steps, K=writes, D=dim, BD=block,
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


def _depth(programs: int) -> int:
    """How many writes ahead a chain loads: several where there are few chains."""
    return 3 if programs < FEWEST_PROGRAMS else 0


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _token_warps(elements: int) -> int:
    """Warps of a program that holds several tiles of so many elements: 32 of each a thread."""
    return min(8, max(1, elements // 1024))
