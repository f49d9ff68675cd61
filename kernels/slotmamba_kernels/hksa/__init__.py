"""HKSA: the recurrent slot memory (hksa.md, sections 2, 3 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.dtypes import state_dtype
from slotmamba_kernels.hksa.arguments import Inject, Surprise, check_arguments
from slotmamba_kernels.hksa.decode import hksa_step_
from slotmamba_kernels.hksa.reference import hksa_reference
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.hksa.vectorized import hksa_torch

__all__ = ["SlotState", "hksa", "hksa_step_"]

BACKENDS = {"reference": hksa_reference, "torch": hksa_torch}


def hksa(
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
    state: SlotState | None = None,
    doc_start: Tensor | None = None,
    surprise: Surprise | None = None,
    inject: Inject | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SlotState]:
    """Writes each token into its active slots and reads from them, in time order.

    The state and everything computed is float32, or float64 when q is. Gradients reach every floating-point input and
    the entering state; the prediction error behind `surprise` is a measurement, none flows through it.

    Args:
        q: [B, T, H, d] read queries, RMS-normalised per head.
        k: [B, T, H, n, d] Householder directions of unit length.
        u_k, u_v: [B, T, H, n, d] what each step writes to key and value memory.
        beta: [B, T, H, n] step sizes in [0, 2].
        write_idx, write_w: [B, T, H, K] active slots of the write, distinct integers below num_slots, and their
            weights in [0, 1); a weight of 0 changes nothing.
        read_idx, read_w: [B, T, H, K'] the same for the read.
        gamma: [H] power of the decay, >= 0.
        num_slots: slots of a head, M.
        state: entering memory; None is `SlotState.initial`.
        doc_start: [B, T] integers, index counted from the call's first token of the first token of t's document;
            negative when it began before the call. None: one document, that of the entering state.
        surprise: (a_s [H], eta [H]) in (0, 1); None leaves the surprise of the state as it is.
        inject: (c_k, c_v [B, T, H, K, d], lam_k, lam_v [B, T, H, K]) of the encoder injection, or None.
        backend: "reference" (token by token), "torch" (vectorised over slots) or "auto", which is "torch".

    Returns:
        o [B, T, H, d] in q's dtype, and the memory after the last token, of the document alive there.

    Raises:
        ValueError: an unknown backend, shapes that do not fit, or (looked for on a CPU) slots that do not exist.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"hksa: unknown backend {backend!r}, expected one of auto, {', '.join(BACKENDS)}")
    named = {
        "q": q, "k": k, "u_k": u_k, "u_v": u_v, "beta": beta, "write_idx": write_idx, "write_w": write_w,
        "read_idx": read_idx, "read_w": read_w, "gamma": gamma,
    }  # fmt: skip
    check_arguments(named, num_slots, state, doc_start, surprise, inject)
    dtype = state_dtype(q)
    if state is None:
        batch, _, heads, dim = q.shape
        state = SlotState.initial(batch, heads, num_slots, dim, device=q.device, dtype=dtype)
    run = BACKENDS["torch" if backend == "auto" else backend]
    # The forward passes of autograd functions are seen by autocast, and their products would be computed in bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        o, state = run(
            *(x.to(dtype) if x.is_floating_point() else x for x in named.values()),
            state=state.map(lambda x: x.to(dtype)),
            doc_start=doc_start,
            surprise=None if surprise is None else (surprise[0].to(dtype), surprise[1].to(dtype)),
            inject=None if inject is None else _to(inject, dtype),
        )
    return o.to(q.dtype), state


def _to(inject: Inject, dtype: torch.dtype) -> Inject:
    c_k, c_v, lam_k, lam_v = (x.to(dtype) for x in inject)
    return c_k, c_v, lam_k, lam_v
