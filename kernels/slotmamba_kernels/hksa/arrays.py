"""The tensors that HKSA's kernels work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slotmamba_kernels.hksa.event_plan import EventPlan


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
