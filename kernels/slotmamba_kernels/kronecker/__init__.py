"""Kronecker addressing: the K heaviest of p^U slots from U softmaxes over p entries, without forming p^U numbers."""

from __future__ import annotations

from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.kronecker.vectorized import kronecker_topk_torch

__all__ = ["kronecker_topk"]

MAX_SLOTS = 2**31  # indices are int32

# What the fused kernel takes: its programs hold a factor and the kept slots in registers.
MAX_FUSED_K = 32
MAX_FUSED_SIZE = 64
MAX_FUSED_FLAT_SIZE = 4096  # of a single factor


def kronecker_topk(logits: Tensor, k: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The K heaviest slots of a Kronecker product of softmaxes, and their weights (hksa.md section 1).

    The weight of slot (i_1, ..., i_U) is the product of the factors' softmax entries; its index is
    sum_u i_u p^(U-u). Factors are merged one at a time and the best K partial sums of logarithms kept, which is exact:
    a top-K product has top-K prefixes only. The weights are not renormalised. Gradient reaches the kept entries only.

    Slots are ordered by their sums of logits, each less the largest of its factor, added from the first factor to the
    last in float32 (float64 for float64 logits): by weight, but for weights closer than that rounding. Of slots with
    equal sums the one whose first U - 1 digits rank higher goes first, then the one with the smaller last digit. Both
    backends keep to this, so they find the same slots.

    Args:
        logits: [..., U, p], any floating dtype, temperature applied.
        k: slots to keep, 1 <= k <= p^U; p^U is at most 2^31.
        backend: "torch"; "triton", one kernel forward and one backward, for float32, bfloat16 or float16 logits,
            k <= 32, and p <= 64 or, with U = 1, p <= 4096; or "auto", which is "triton" on GPUs that it has been
            checked on, for the sizes it takes, and "torch" elsewhere.

    Returns:
        indices: [..., k] int32, distinct, heaviest first.
        weights: [..., k] in (0, 1), float32 (float64 for float64 logits).

    Raises:
        ValueError: logits with fewer than two dimensions, k out of range, too many slots, an unknown backend, or
            "triton" where it cannot run.
    """
    if logits.ndim < 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected [..., U, p]")
    factors, size = logits.shape[-2:]
    if not 1 <= k <= size**factors:
        raise ValueError(f"k={k} is not between 1 and the {size}^{factors} = {size**factors} slots")
    if size**factors > MAX_SLOTS:
        raise ValueError(f"{size}^{factors} slots are more than the 2^31 that an int32 index tells apart")
    fused = fits_fused(factors, size, k)
    if backend == "triton" and not fused:
        raise ValueError(
            f"kronecker_topk: backend 'triton' takes k <= {MAX_FUSED_K}, and p <= {MAX_FUSED_SIZE} or, with U = 1, "
            f"p <= {MAX_FUSED_FLAT_SIZE}; not k={k}, U={factors}, p={size}: use 'torch' or 'auto'"
        )
    available = ("torch", "triton") if fused else ("torch",)
    if choose_backend("kronecker_topk", backend, logits, available) == "torch":
        return kronecker_topk_torch(logits, k)
    from slotmamba_kernels.kronecker.fused import kronecker_topk_fused

    weights, indices = kronecker_topk_fused(logits.contiguous(), k)
    return indices, weights


def fits_fused(factors: int, size: int, k: int) -> bool:
    """Whether the fused kernel takes U factors of p entries and k slots."""
    return k <= MAX_FUSED_K and size <= (MAX_FUSED_SIZE if factors > 1 else MAX_FUSED_FLAT_SIZE)
