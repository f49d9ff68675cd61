"""HKSA for one token of every row, on the state in place: what decoding repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.dtypes import state_dtype
from slotmamba_kernels.hksa.arguments import Surprise
from slotmamba_kernels.hksa.reference import hksa_reference
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.kronecker import fits_fused, kronecker_topk

MAX_FUSED_STEPS = 4
MAX_FUSED_DIM = 256


@torch.no_grad()
def hksa_step_(
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_logits: Tensor,
    read_logits: Tensor,
    gamma: Tensor,
    *,
    state: SlotState,
    top_k: int,
    surprise: Surprise | None = None,
    backend: str = "auto",
) -> Tensor:
    """Addresses, writes and reads one token of every row: `kronecker_topk` twice, then `hksa` with T = 1, in place.

    The state is overwritten, only the top_k written slots of it: whoever holds its tensors sees the token. No gradient
    comes back. Injection is not covered: its vectors depend on the address, so it needs `kronecker_topk` and `hksa`.

    On a GPU this is one kernel ("triton"), which allocates nothing but the output and can be captured in a CUDA graph
    if the inputs are contiguous.

    Args:
        q: [B, H, d]; k, u_k, u_v: [B, H, n, d]; beta: [B, H, n]: the token's, as in `hksa`.
        write_logits, read_logits: [B, H, U, p], as in `kronecker_topk`.
        gamma: [H].
        state: of p^U slots, float32 (float64 where q is), contiguous; overwritten.
        top_k: slots that the token writes and slots that it reads.
        surprise: (a_s [H], eta [H]) or None, as in `hksa`.
        backend: "torch"; "triton", for what the fused `kronecker_topk` takes, n <= 4, d <= 256 and q in float32,
            bfloat16 or float16; or "auto", which is "triton" on GPUs that it has been checked on, for the sizes it
            takes, and "torch" elsewhere.

    Returns:
        o [B, H, d] in q's dtype.

    Raises:
        ValueError: shapes that do not fit, a state of another dtype or not contiguous, top_k out of range, an unknown
            backend, or "triton" where it cannot run.
    """
    _check(q, k, u_k, u_v, beta, write_logits, read_logits, gamma, state, top_k, surprise)
    factors, size = write_logits.shape[-2:]
    fused = k.shape[2] <= MAX_FUSED_STEPS and q.shape[-1] <= MAX_FUSED_DIM and fits_fused(factors, size, top_k)
    if backend == "triton" and not fused:
        raise ValueError(
            f"hksa_step_: backend 'triton' takes n <= {MAX_FUSED_STEPS}, d <= {MAX_FUSED_DIM} and the addresses of the "
            f"fused kronecker_topk; not n={k.shape[2]}, d={q.shape[-1]}, U={factors}, p={size}, top_k={top_k}: use "
            "'torch' or 'auto'"
        )
    available = ("torch", "triton") if fused else ("torch",)
    if choose_backend("hksa_step_", backend, q, available) == "torch":
        with torch.autocast(q.device.type, enabled=False):
            return _step_torch(q, k, u_k, u_v, beta, write_logits, read_logits, gamma, state, top_k, surprise)
    from slotmamba_kernels.hksa.decode_fused import hksa_step_fused

    inputs = [x.contiguous() for x in (q, k, u_k, u_v, beta, write_logits, read_logits, gamma)]
    return hksa_step_fused(*inputs, *(surprise or (None, None)), state.S_k, state.S_v, state.z, state.surprise, top_k)


def _step_torch(
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_logits: Tensor,
    read_logits: Tensor,
    gamma: Tensor,
    state: SlotState,
    top_k: int,
    surprise: Surprise | None,
) -> Tensor:
    """The token-by-token definition on a memory of the addressed slots alone: first the written ones, then the read."""
    (write_idx, write_w), (read_idx, read_w) = (kronecker_topk(x, top_k) for x in (write_logits, read_logits))
    slots = torch.cat([write_idx, read_idx], -1).long()
    touched = state.map(lambda x: x.gather(2, _like(slots, x)))
    # Where a slot is both written and read, the read takes the written row.
    same = read_idx.unsqueeze(-1) == write_idx.unsqueeze(-2)  # [B, H, reads, writes]
    rows = torch.arange(top_k, device=q.device)
    read_row = torch.where(same.any(-1), same.int().argmax(-1), top_k + rows)
    dtype = state.z.dtype

    def token(x: Tensor) -> Tensor:
        """With a T of 1; numbers in the state's dtype."""
        return (x.to(dtype) if x.is_floating_point() else x).unsqueeze(1)

    o, touched = hksa_reference(
        q=token(q),
        k=token(k),
        u_k=token(u_k),
        u_v=token(u_v),
        beta=token(beta),
        write_idx=token(rows.expand_as(read_row)),
        write_w=token(write_w),
        read_idx=token(read_row),
        read_w=token(read_w),
        gamma=gamma.to(dtype),
        state=touched,
        doc_start=None,
        surprise=None if surprise is None else (surprise[0].to(dtype), surprise[1].to(dtype)),
        inject=None,
    )
    for memory, row in zip(vars(state).values(), vars(touched).values(), strict=True):
        memory.scatter_(2, _like(slots[..., :top_k], memory), row[:, :, :top_k])
    return o.squeeze(1).to(q.dtype)


def _like(slots: Tensor, memory: Tensor) -> Tensor:
    """slots [B, H, K] as an index of memory [B, H, M] or [B, H, M, d]."""
    return slots if memory.ndim == 3 else slots.unsqueeze(-1).expand(*slots.shape, memory.shape[-1])


def _check(
    q: Tensor,
    k: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    beta: Tensor,
    write_logits: Tensor,
    read_logits: Tensor,
    gamma: Tensor,
    state: SlotState,
    top_k: int,
    surprise: Surprise | None,
) -> None:
    if q.ndim != 3 or k.ndim != 4 or write_logits.ndim != 4 or 0 in (*q.shape, *k.shape, *write_logits.shape):
        raise ValueError(
            f"hksa_step_: q, k and write_logits have shapes {tuple(q.shape)}, {tuple(k.shape)} and "
            f"{tuple(write_logits.shape)}, expected [B, H, d], [B, H, n, d] and [B, H, U, p], each at least 1"
        )
    batch, heads, dim = q.shape
    steps = k.shape[2]
    factors, size = write_logits.shape[2:]
    vectors, slots = (batch, heads, steps, dim), (batch, heads, size**factors)
    expected = {
        "k": (k, vectors), "u_k": (u_k, vectors), "u_v": (u_v, vectors), "beta": (beta, vectors[:-1]),
        "write_logits": (write_logits, (batch, heads, factors, size)), "gamma": (gamma, (heads,)),
        "read_logits": (read_logits, (batch, heads, factors, size)),
        "state.S_k": (state.S_k, (*slots, dim)), "state.S_v": (state.S_v, (*slots, dim)),
        "state.z": (state.z, slots), "state.surprise": (state.surprise, slots),
    }  # fmt: skip
    if surprise is not None:
        expected |= {"surprise a_s": (surprise[0], (heads,)), "surprise eta": (surprise[1], (heads,))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"hksa_step_: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not 1 <= top_k <= size**factors:
        raise ValueError(f"hksa_step_: top_k={top_k} is not between 1 and the {size**factors} slots")
    # Not by vars(), which torch.compile of torch 2.11 does not follow.
    for name, tensor in (("S_k", state.S_k), ("S_v", state.S_v), ("z", state.z), ("surprise", state.surprise)):
        if tensor.dtype != state_dtype(q) or not tensor.is_contiguous():
            raise ValueError(
                f"hksa_step_: state.{name} is {tensor.dtype} with strides {tensor.stride()}, expected contiguous "
                f"{state_dtype(q)}: it is overwritten in place"
            )
