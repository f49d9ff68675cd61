"""Cross-entropy of a linear layer's logits, without ever holding all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from slotmamba_kernels.backends import choose_backend
from slotmamba_kernels.cross_entropy.chunked import linear_cross_entropy_op
from slotmamba_kernels.cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy"]

BACKENDS = ("reference", "torch", "triton")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the logits hidden @ weight^T, row by row.

    Logits are multiplied as `torch.nn.Linear` would, under autocast in its dtype, and reduced in float32 (float64 for
    float64). All backends but "reference" hold those of a block of rows at a time, compute them a second time in the
    backward pass and add up the weight's gradient in float32. Gradients reach hidden and weight, from nll and from
    log_partition.

    Args:
        hidden: [N, C] inputs of the layer, N >= 0.
        weight: [V, C] its matrix, of hidden's dtype unless autocast is on.
        targets: [N] integers in [0, V).
        backend: "reference" (all logits at once), "torch" or "triton" (a block at a time), or "auto": "triton" on a GPU
            that it has been checked on, else "torch".

    Returns:
        nll [N], log(sum(exp(logits))) - logits[target]; log_partition [N], log(sum(exp(logits))); correct [N] bool,
        whether the largest logit is the target's (of equal ones the first counts).

    Raises:
        ValueError: an unknown backend or one that cannot run here, shapes or dtypes that do not fit together, or
            (looked for on a CPU) targets that do not exist.
    """
    _check(hidden, weight, targets)
    chosen = choose_backend("linear_cross_entropy", backend, hidden, BACKENDS)
    if chosen == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets)
    dtype = _autocast_dtype(hidden) or hidden.dtype
    nll, log_partition, correct = linear_cross_entropy_op(hidden, weight, targets.long(), dtype, chosen)
    return nll, log_partition, correct


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast would have a linear layer multiply in: nothing new where it is off or the numbers are float64."""
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(hidden.device.type):
        return None
    return torch.get_autocast_dtype(hidden.device.type)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not len(weight):
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"linear_cross_entropy: hidden and weight have shapes {shapes}, expected [N, C] and [V, C]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: targets have shape {list(targets.shape)}, expected [{len(hidden)}], one a row"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"linear_cross_entropy: targets have dtype {targets.dtype}, expected integers")
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"linear_cross_entropy: hidden and weight are {hidden.dtype} and {weight.dtype}, expected floating point"
        )
    if weight.dtype != hidden.dtype and (_autocast_dtype(hidden) is None or weight.dtype == torch.float64):
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or use autocast"
        )
    # On a GPU looking would stall it, and compiled code has no numbers to look at.
    look = targets.device.type == "cpu" and len(targets) > 0 and not torch.compiler.is_compiling()
    if look and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        raise ValueError(
            f"linear_cross_entropy: targets from {int(targets.min())} to {int(targets.max())}, "
            f"expected 0 to {len(weight) - 1}"
        )
