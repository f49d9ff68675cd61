"""The mix of two slot memories, where a segment begins (hksa.md, section 4)."""

from __future__ import annotations

from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.hksa.state import SlotState
from slotmamba_kernels.threading.vectorized import thread_torch


def thread_slots(own: SlotState, below: SlotState, bias: Tensor, slope: Tensor, *, backend: str = "auto") -> SlotState:
    """Mixes a layer's memory with that of the layer below: g * own + (1 - g) * below, slot by slot.

    g = sigmoid(bias + slope * log(surprise + 1e-6)) with `own`'s surprise. Gradients reach both memories and the gate's
    parameters; sums are added up in the same order every time.

    Args:
        own, below: memories of the same B, H, M and d.
        bias, slope: [H].
        backend: "torch", which makes sparse memories dense; "triton", one kernel forward and one backward, for memories
            in float32; or "auto": "triton" on GPUs that it has been checked on, else "torch". Two sparse memories have
            a sparse mix there, of the slots that either holds; the GPU is waited for once, to count them.

    Returns:
        The mix, in the memories' dtype.

    Raises:
        ValueError: memories or parameters that do not fit, an unknown backend, or "triton" where it cannot run.
    """
    chosen = choose_backend("thread_slots", backend, own.z, ("torch", "triton"))
    sizes = _sizes(own)
    if _sizes(below) != sizes:
        raise ValueError(f"thread_slots: below has B, H, M, d = {_sizes(below)}, own has {sizes}")
    for name, x in (("bias", bias), ("slope", slope)):
        if tuple(x.shape) != (sizes[1],):
            raise ValueError(f"thread_slots: {name} has shape {tuple(x.shape)}, expected {(sizes[1],)}")
    if below.z.dtype != own.z.dtype:
        raise ValueError(f"thread_slots: own is {own.z.dtype}, below is {below.z.dtype}")
    if chosen == "torch":
        return thread_torch(own.dense(), below.dense(), bias, slope)
    from slotmamba_kernels.threading.fused import thread_fused

    return thread_fused(own, below, bias, slope)


def _sizes(state: SlotState) -> tuple[int, int, int, int]:
    batch, heads, _, dim = state.S_k.shape
    return batch, heads, state.num_slots, dim
