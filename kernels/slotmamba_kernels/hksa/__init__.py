"""HKSA: the recurrent slot memory (hksa.md, sections 2, 3 and 6)."""

from __future__ import annotations

from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.hksa.arguments import Inject, Surprise, check_arguments, wide_indices
from slotmamba_kernels.hksa.decode import hksa_step_
from slotmamba_kernels.hksa.eager import Run, run_eager
from slotmamba_kernels.hksa.reference import hksa_reference
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.hksa.vectorized import hksa_torch

__all__ = ["SlotState", "hksa", "hksa_step_"]

BACKENDS: dict[str, Run] = {"reference": hksa_reference, "torch": hksa_torch}

# What the kernels have been tested for: beyond it their programs would no longer fit the registers.
MAX_DIM, MAX_STEPS, MAX_ACTIVE = 256, 4, 32


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
    recompute: bool = False,
    return_state: bool = True,
) -> tuple[Tensor, SlotState | None]:
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
        state: entering memory; None is `SlotState.initial` without its M rows. With many slots (DENSE_SLOTS in
            state.py), backend "triton" answers None with a sparse memory; a dense one is followed by a dense one.
        doc_start: [B, T] integers, index counted from the call's first token of the first token of t's document;
            negative when it began before the call. None: one document, that of the entering state.
        surprise: (a_s [H], eta [H]) in (0, 1); None leaves the surprise of the state as it is.
        inject: (c_k, c_v [B, T, H, K, d], lam_k, lam_v [B, T, H, K]) of the encoder injection, or None.
        backend: "reference" (token by token), "torch" (vectorised over slots), "triton" (GPU kernels, for inputs in
            float32, bfloat16 or float16, d <= 256, n <= 4, K and K' <= 32), or "auto": "triton" on GPUs that it has
            been checked on, for what it takes, else "torch".
        recompute: keep only the inputs and the memory at the boundaries of stretches of tokens for the backward pass;
            everything between is computed again there. Same values, less memory, one more forward pass.
        return_state: False for a caller that has no use for the leaving memory, which is then not made, nor is the
            surprise computed (a_s and eta get no gradient).

    Returns:
        o [B, T, H, d] in q's dtype, and the memory after the last token, of the document alive there, or None.

    Raises:
        ValueError: an unknown backend or one that cannot run here, shapes that do not fit, or (looked for on a CPU)
            slots that do not exist.
    """
    named = {
        "q": q, "k": k, "u_k": u_k, "u_v": u_v, "beta": beta, "write_idx": write_idx, "write_w": write_w,
        "read_idx": read_idx, "read_w": read_w, "gamma": gamma,
    }  # fmt: skip
    check_arguments(named, num_slots, state, doc_start, surprise, inject)
    doc_start = wide_indices(doc_start)
    fits = fits_triton(named)
    if backend == "triton" and not fits:
        raise ValueError(
            f"hksa: backend 'triton' takes d <= {MAX_DIM}, {MAX_STEPS} Householder steps and {MAX_ACTIVE} active slots "
            f"at most; k has shape {tuple(k.shape)}, write_idx {tuple(write_idx.shape)}, read_idx "
            f"{tuple(read_idx.shape)}: use 'torch' or 'auto'"
        )
    chosen = choose_backend("hksa", backend, q, (*BACKENDS, "triton") if fits else BACKENDS)
    if not return_state:
        surprise = None  # what a token reads does not depend on it
    if chosen == "triton":
        from slotmamba_kernels.hksa.triton_op import hksa_triton

        return hksa_triton(
            **named, num_slots=num_slots, state=state, doc_start=doc_start, surprise=surprise, inject=inject,
            recompute=recompute, return_state=return_state,
        )  # fmt: skip
    o, leaving = run_eager(
        BACKENDS[chosen], named, num_slots=num_slots, state=state, doc_start=doc_start, surprise=surprise,
        inject=inject, recompute=recompute,
    )  # fmt: skip
    return o, leaving if return_state else None


def fits_triton(named: dict[str, Tensor]) -> bool:
    """Whether the kernels take vectors and numbers of steps and slots of these sizes."""
    steps, dim = named["k"].shape[3:]
    active = max(named["write_idx"].shape[-1], named["read_idx"].shape[-1])
    return dim <= MAX_DIM and steps <= MAX_STEPS and active <= MAX_ACTIVE
