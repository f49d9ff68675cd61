"""Kronecker addressing in one kernel each way, as ops that torch.compile and autograd see."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from slotmamba_kernels.custom_op import custom_op
from slotmamba_kernels.kronecker.triton_kernels import topk_backward, topk_forward

CHUNK = 64  # entries of a factor that the backward kernel compares with the kept slots' digits at a time


class Launch(NamedTuple):
    """Rows that a program handles, and its warps."""

    rows: int
    warps: int


def launch_for(values: int) -> Launch:
    """For kernels that hold `values` numbers a row.

    A thread keeps a row's numbers to itself while they fit its registers; four warps make a program then. Else a power
    of two of threads shares them, one warp to a program while that is enough: reductions then need no shared memory.
    """
    threads = triton.next_power_of_2(triton.cdiv(values, 100))
    if threads == 1:
        return Launch(rows=128, warps=4)
    return Launch(rows=max(32 // threads, 1), warps=min(max(threads // 32, 1), 16))


@custom_op("slotmamba::kronecker_topk")
def kronecker_topk_fused(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """logits [..., U, p], contiguous -> weights float32 and indices int32, both [..., k].

    In this order because `torch.library.opcheck` starts from the first output to add them up.
    """
    weights, indices = _empty_outputs(logits, k)
    factors, size = logits.shape[-2:]
    rows = weights.numel() // k
    if not rows:
        return weights, indices
    p, beam = triton.next_power_of_2(size), triton.next_power_of_2(k)
    launch = launch_for(3 * p + 4 * beam)
    topk_forward[(triton.cdiv(rows, launch.rows),)](
        logits, indices, weights, rows,
        FACTORS=factors, SIZE=size, K=k, P=p, BEAM=beam, ROWS=launch.rows, num_warps=launch.warps,
    )  # fmt: skip
    return weights, indices


@custom_op("slotmamba::kronecker_topk_backward")
def kronecker_topk_backward(logits: Tensor, weights: Tensor, indices: Tensor, d_weights: Tensor) -> Tensor:
    """Gradient of the logits [..., U, p], in their dtype, from that of the weights [..., k]; all contiguous."""
    d_logits = torch.empty_like(logits)
    factors, size = logits.shape[-2:]
    k = weights.shape[-1]
    rows = weights.numel() // k
    if not rows:
        return d_logits
    p, beam = triton.next_power_of_2(size), triton.next_power_of_2(k)
    chunk = min(p, CHUNK)
    # Comparisons are not kept, so they count less than a number each.
    launch = launch_for(max(3 * p, beam * chunk // 2))
    topk_backward[(triton.cdiv(rows, launch.rows),)](
        logits, indices, weights, d_weights, d_logits, rows,
        FACTORS=factors, SIZE=size, K=k, P=p, BEAM=beam, CHUNK=chunk, ROWS=launch.rows, num_warps=launch.warps,
    )  # fmt: skip
    return d_logits


def _empty_outputs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-2], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


kronecker_topk_fused.register_fake(_empty_outputs)


@kronecker_topk_backward.register_fake
def _(logits: Tensor, weights: Tensor, indices: Tensor, d_weights: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx: Any, d_weights: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return kronecker_topk_backward(*ctx.saved_tensors, d_weights.contiguous()), None


kronecker_topk_fused.register_autograd(_backward, setup_context=_save)
