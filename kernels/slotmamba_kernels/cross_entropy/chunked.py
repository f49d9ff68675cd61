"""Cross-entropy of a linear layer, a block of rows at a time: only one block of logits ever exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from slotmamba_kernels.cross_entropy import vectorized
from slotmamba_kernels.custom_op import custom_op
from slotmamba_kernels.dtypes import state_dtype

CPU_BLOCK, GPU_BLOCK = 2**22, 2**26
"""Logits held at once: on a CPU what stays near its cache, 16 MiB of float32; on a GPU what matrix products need to run
at full speed, 128 MiB in 2 bytes a number."""


class RowKernels(Protocol):
    """What a backend does to a block of logits, whose contents it may overwrite."""

    def statistics(
        self, logits: Tensor, targets: Tensor, nll: Tensor, log_partition: Tensor, correct: Tensor
    ) -> None: ...

    def gradient(
        self, logits: Tensor, targets: Tensor, log_partition: Tensor, d_nll: Tensor, d_log_partition: Tensor
    ) -> None: ...


def _kernels(backend: str) -> RowKernels:
    if backend == "triton":
        from slotmamba_kernels.cross_entropy import triton_kernels

        return triton_kernels
    return vectorized


@custom_op("slotmamba::linear_cross_entropy")
def linear_cross_entropy_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """nll, log_partition and correct of hidden [N, C] @ weight^T [C, V], multiplied in `dtype`; targets int64 [N]."""
    nll, log_partition, correct = _outputs(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, _, logits in _blocks(hidden.to(dtype), weight.to(dtype)):
            _kernels(backend).statistics(logits, targets[rows], nll[rows], log_partition[rows], correct[rows])
    return nll, log_partition, correct


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden)


@custom_op("slotmamba::linear_cross_entropy_backward")
def linear_cross_entropy_backward_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    d_nll: Tensor,
    d_log_partition: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, in their dtypes. The weight's is added up in float32 (float64 for float64)."""
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=state_dtype(weight))
    d_nll, d_log_partition = d_nll.contiguous(), d_log_partition.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        for rows, inputs, logits in _blocks(hidden.to(dtype), matrix):
            _kernels(backend).gradient(logits, targets[rows], log_partition[rows], d_nll[rows], d_log_partition[rows])
            d_hidden[rows] = logits @ matrix
            _add_product(d_weight, logits.t(), inputs)
    return d_hidden, d_weight.to(weight.dtype)


@linear_cross_entropy_backward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    d_nll: Tensor,
    d_log_partition: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, targets, output[1])


def _backward(ctx: Any, d_nll: Tensor, d_log_partition: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = linear_cross_entropy_backward_op(*ctx.saved_tensors, d_nll, d_log_partition, ctx.dtype, ctx.backend)
    return *gradients, None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[:1]
    dtype = state_dtype(hidden)
    nll, log_partition = hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows, dtype=dtype)
    return nll, log_partition, hidden.new_empty(rows, dtype=torch.bool)


def block_rows(vocab: int, device: str) -> int:
    """Rows whose logits are held at once on a type of device; of many, as many as fill tiles of a matrix product."""
    rows = max(1, (CPU_BLOCK if device == "cpu" else GPU_BLOCK) // vocab)
    return rows if rows < 128 else rows // 128 * 128


def _blocks(hidden: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of hidden [N, C], what they hold, and their logits, in memory that the next block overwrites."""
    count = min(block_rows(len(matrix), hidden.device.type), len(hidden))
    memory = hidden.new_empty(count, len(matrix))
    for start in range(0, len(hidden), max(count, 1)):
        rows = slice(start, min(start + count, len(hidden)))
        inputs = hidden[rows]
        yield rows, inputs, torch.mm(inputs, matrix.t(), out=memory[: len(inputs)])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on CUDA the product of low-precision matrices is added before it is rounded."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)
