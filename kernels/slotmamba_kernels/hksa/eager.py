"""Runs the backends that are made of torch operations: in the state's precision, and in stretches to save memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isqrt

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slotmamba_kernels.dtypes import state_dtype
from slotmamba_kernels.hksa.arguments import Inject, Surprise
from slotmamba_kernels.hksa.state import SlotState

Run = Callable[..., tuple[Tensor, SlotState]]


def run_eager(
    run: Run,
    named: dict[str, Tensor],
    *,
    num_slots: int,
    state: SlotState | None,
    doc_start: Tensor | None,
    surprise: Surprise | None,
    inject: Inject | None,
    recompute: bool,
) -> tuple[Tensor, SlotState]:
    """See `slotmamba_kernels.hksa`; `named` are the arguments up to gamma, checked and as the caller gave them."""
    q, gamma = named["q"], named["gamma"]
    batch, length, heads, dim = q.shape
    dtype = state_dtype(q)
    if state is None:
        state = SlotState.initial(batch, heads, num_slots, dim, device=q.device, dtype=dtype)
    state = state.dense().map(lambda x: x.to(dtype))
    of_heads = (gamma, *(surprise or (None, None)))
    of_tokens = (*(x for name, x in named.items() if name != "gamma"), doc_start, *(inject or (None,) * 4))
    if not recompute:
        return _run_stretch(run, 0, *of_heads, *vars(state).values(), *of_tokens)
    size = _stretch_length(length, num_slots, named["write_idx"].shape[-1])
    starts = range(0, length, size)
    # Split once: the backward pass of a split puts the gradients of all stretches together once.
    stretches = zip(*([None] * len(starts) if x is None else x.split(size, 1) for x in of_tokens), strict=True)
    outputs = []
    for start, tokens in zip(starts, stretches, strict=True):
        o, state = checkpoint(
            partial(_run_stretch, run, start), *of_heads, *vars(state).values(), *tokens,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        outputs.append(o)
    return torch.cat(outputs, 1), state


def _run_stretch(
    run: Run,
    start: int,
    gamma: Tensor,
    a_s: Tensor | None,
    eta: Tensor | None,
    S_k: Tensor,
    S_v: Tensor,
    z: Tensor,
    score: Tensor,
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_idx: Tensor,
    write_w: Tensor,
    read_idx: Tensor,
    read_w: Tensor,
    doc_start: Tensor | None,
    *inject: Tensor | None,
) -> tuple[Tensor, SlotState]:
    """Tokens from `start` on, from the memory before them. Flat arguments, so that a checkpoint sees all tensors."""

    def cast(*tensors: Tensor | None) -> tuple[Tensor, ...] | None:
        return None if tensors[0] is None else tuple(x.to(z.dtype) for x in tensors if x is not None)

    # The forward passes of autograd functions are seen by autocast, and their products would be computed in bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        numbers = {"q": q, "k": k, "u_k": u_k, "u_v": u_v, "beta": beta, "write_w": write_w, "read_w": read_w}
        o, state = run(
            **{name: x.to(z.dtype) for name, x in numbers.items()},
            write_idx=write_idx,
            read_idx=read_idx,
            gamma=gamma.to(z.dtype),
            state=SlotState(S_k, S_v, z, score),
            doc_start=None if doc_start is None else doc_start - start,
            surprise=cast(a_s, eta),
            inject=cast(*inject),
        )
    return o.to(q.dtype), state


def _stretch_length(length: int, num_slots: int, writes: int) -> int:
    """Tokens of a stretch for which the least is kept: the memory, M states, at the boundary of every stretch, and
    within the one stretch that the backward pass is at, the K states that each token leaves."""
    return min(length, isqrt(length * num_slots // writes) + 1)
