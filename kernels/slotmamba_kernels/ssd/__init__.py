"""SSD: the scalar-decay state space recurrence of Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.dtypes import state_dtype
from slotmamba_kernels.ssd.mamba import HOW_TO_INSTALL, mamba_installed, ssd_mamba
from slotmamba_kernels.ssd.reference import ssd_reference
from slotmamba_kernels.ssd.vectorized import ssd_torch

__all__ = ["ssd"]

BACKENDS = {"reference": ssd_reference, "torch": ssd_torch, "mamba_ssm": ssd_mamba}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state space recurrence (arXiv:2405.21060), head by head:

        h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

    Head i reads and writes with B and C of group i // (H/G). The state and everything computed is float32, or float64
    when x is; the mamba_ssm kernels multiply matrices in the dtype of x. Gradients reach every tensor argument, from y
    and from the leaving state.

    Args:
        x: [B, T, H, P] inputs, T >= 1.
        dt: [B, T, H] step sizes >= 0, that is, after the softplus.
        A: [H], negative.
        B, C: [B, T, G, N], G a divisor of H.
        D: [H], or None for no skip.
        initial_state: [B, H, P, N]; None is zeros.
        chunk_size: tokens of a chunk; changes speed and rounding only.
        backend: "reference" (token by token), "torch" (chunked, CPU and GPU), "mamba_ssm" (kernels of the package
            mamba-ssm, CUDA only) or "auto": mamba_ssm where it is installed, x is on CUDA and not float64, else torch.

    Returns:
        y [B, T, H, P] in x's dtype, and the leaving state [B, H, P, N].

    Raises:
        ValueError: an unknown backend or one that cannot run here, or shapes or dtypes that do not fit together.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"ssd: unknown backend {backend!r}, expected one of auto, {', '.join(BACKENDS)}")
    _check(x, dt, A, B, C, D, initial_state, chunk_size)
    kernels_fit = x.is_cuda and x.dtype != torch.float64
    if backend == "auto":
        backend = "mamba_ssm" if kernels_fit and mamba_installed() else "torch"
    elif backend == "mamba_ssm":
        if not mamba_installed():
            raise ValueError(f"ssd: backend 'mamba_ssm' needs the package mamba-ssm: {HOW_TO_INSTALL}")
        if not kernels_fit:
            raise ValueError(f"ssd: backend 'mamba_ssm' runs on CUDA and not in float64, x is {x.dtype} on {x.device}")

    dtype = state_dtype(x)
    matrices = x.dtype if backend == "mamba_ssm" else dtype
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=dtype)
    y, state = BACKENDS[backend](
        x.to(matrices),
        dt.to(dtype),
        A.to(dtype),
        B.to(matrices),
        C.to(matrices),
        None if D is None else D.to(dtype),
        initial_state.to(dtype),
        chunk_size,
    )
    return y.to(x.dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.ndim != 4 or not x.shape[1]:
        raise ValueError(f"ssd: x has shape {list(x.shape)}, expected [B, T, H, P] with T >= 1")
    batch, length, heads, dim = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, length) or not B.shape[2] or heads % B.shape[2]:
        raise ValueError(
            f"ssd: B has shape {list(B.shape)}, expected [{batch}, {length}, G, N], G a divisor of the {heads} heads"
        )
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("dt", dt, (batch, length, heads)),
        ("A", A, (heads,)),
        ("C", C, tuple(B.shape)),
        ("D", D, (heads,)),
        ("initial_state", initial_state, (batch, heads, dim, B.shape[3])),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    for name, tensor, _ in [("x", x, ()), ("B", B, ()), *expected]:
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"ssd: {name} is {tensor.dtype}, expected a floating-point dtype")
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size={chunk_size}, expected at least 1")
