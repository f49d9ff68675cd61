"""BD-LRU: a linear recurrence in small blocks of channels, mixed by matrices that depend on the token."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.bdlru.reference import bdlru_reference
from slotmamba_kernels.bdlru.vectorized import bdlru_torch
from slotmamba_kernels.dtypes import state_dtype

__all__ = ["bdlru"]

BACKENDS = {"reference": bdlru_reference, "torch": bdlru_torch}
TRITON_BLOCK_SIZES = (1, 2, 4, 8, 16)


def bdlru(
    v: Tensor,
    gates: Tensor,
    state: Tensor | None = None,
    doc_start: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h_t = A_t h_(t-1) + a0_t * v_t in blocks of m channels (BD-LRU, arXiv:2602.12021, section 3).

    Channel i of block k is channel k*m + i. Its gates at token t are `gates[b, t, k, i]`: the first m are row i of A_t,
    the last is the input gate a0_t. They are used as they are: where the absolute values of every row sum to at most 1,
    as after a softmax, |h| never exceeds the largest |v| and |state|.

    The state and everything computed is float32, or float64 when v is. Gradients reach v, gates and the entering state,
    from h and from the leaving state.

    Args:
        v: [B, T, D] inputs, T >= 1.
        gates: [B, T, D/m, m, m+1].
        state: [B, D] entering state h_(-1); None is zeros.
        doc_start: [B, T] integers, index counted from the call's first token of the first token of t's document;
            negative when it began before the call. A document's first token sees zeros as the state before it. None:
            one document, that of the entering state.
        backend: "reference" (token by token), "torch" (chunked scan), "triton" (GPU kernels; m is 1, 2, 4, 8 or 16,
            v float32, bfloat16 or float16) or "auto", which is "triton" on GPUs where it was checked, else "torch".
            "triton" keeps no state but h for the backward pass: gates get their gradient from h in v's precision.

    Returns:
        h [B, T, D] in v's dtype, and the leaving state [B, D].

    Raises:
        ValueError: a backend that is unknown or cannot run here, or shapes or dtypes that do not fit together.
    """
    _check(v, gates, state, doc_start)
    chosen = _choose_backend(backend, v, m=gates.shape[3])
    dtype = state_dtype(v)
    if state is None:
        state = v.new_zeros(v.shape[0], v.shape[2], dtype=dtype)
    if chosen == "triton":
        from slotmamba_kernels.bdlru.triton_op import bdlru_triton

        return bdlru_triton(v, gates, state.to(dtype), doc_start)
    h, state = BACKENDS[chosen](v.to(dtype), gates.to(dtype), state.to(dtype), doc_start)
    return h.to(v.dtype), state


def _choose_backend(backend: str, v: Tensor, m: int) -> str:
    fits = m in TRITON_BLOCK_SIZES
    if backend == "triton" and not fits:
        sizes = ", ".join(map(str, TRITON_BLOCK_SIZES))
        raise ValueError(f"bdlru: backend 'triton' takes blocks of {sizes} channels, not {m}; use 'torch'")
    return choose_backend("bdlru", backend, v, (*BACKENDS, "triton") if fits else tuple(BACKENDS))


def _check(v: Tensor, gates: Tensor, state: Tensor | None, doc_start: Tensor | None) -> None:
    if v.ndim != 3 or not v.shape[1]:
        raise ValueError(f"bdlru: v has shape {list(v.shape)}, expected [B, T, D] with T >= 1")
    batch, length, width = v.shape
    m = gates.shape[3] if gates.ndim == 5 else 0
    if m == 0 or width % m or gates.shape != (batch, length, width // m, m, m + 1):
        raise ValueError(
            f"bdlru: gates has shape {list(gates.shape)}, expected [B, T, D/m, m, m+1] with B, T, D = {list(v.shape)}"
        )
    if state is not None and state.shape != (batch, width):
        raise ValueError(f"bdlru: state has shape {list(state.shape)}, expected {[batch, width]}")
    for name, tensor in (("v", v), ("gates", gates), ("state", state)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"bdlru: {name} is {tensor.dtype}, expected a floating-point dtype")
    if doc_start is not None:
        if doc_start.shape != (batch, length):
            raise ValueError(f"bdlru: doc_start has shape {list(doc_start.shape)}, expected {[batch, length]}")
        if doc_start.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
            raise ValueError(f"bdlru: doc_start is {doc_start.dtype}, expected signed integers")
