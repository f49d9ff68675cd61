"""What a block of logits is turned into, in one pass over it each: Triton kernels, a program for a row (or part of it).

Everything is float32 from the load on, whatever the dtype of the logits.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Columns and warps of a program: each thread takes 16 bytes of bfloat16 logits at a time, twice.
BLOCK, WARPS = 4096, 8
# Less than any logit that a program meets, and finite: lanes beyond the last column compare with themselves.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _statistics_kernel(logits, targets, nll, log_partition, correct, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    lane = tl.arange(0, BLOCK)
    # Each lane keeps the largest logit of its columns, where it was, and the sum of exponentials relative to it.
    best = tl.full([BLOCK], LOWEST, tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        x = tl.load(logits + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        larger = x > best
        where = tl.where(larger, column, where)
        new = tl.where(larger, x, best)
        total = total * tl.exp(best - new) + tl.exp(x - new)
        best = new
    largest = tl.max(best, 0)
    rest = tl.log(tl.sum(total * tl.exp(best - largest), 0))
    likeliest = tl.min(tl.where(best == largest, where, vocab), 0)
    target = tl.load(targets + row)
    tl.store(log_partition + row, largest + rest)
    tl.store(nll + row, largest - tl.load(logits + target).to(tl.float32) + rest)
    tl.store(correct + row, likeliest == target)


@triton.jit
def _gradient_kernel(logits, targets, log_partition, d_nll, d_log_partition, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * vocab + column
    target = tl.load(targets + row)
    of_nll = tl.load(d_nll + row)
    x = tl.load(place, mask=column < vocab, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.load(log_partition + row))
    gradient = p * (of_nll + tl.load(d_log_partition + row)) - tl.where(column == target, of_nll, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < vocab)


def statistics(logits: Tensor, targets: Tensor, nll: Tensor, log_partition: Tensor, correct: Tensor) -> None:
    """See `vectorized.statistics`; the logits stay as they are."""
    rows, vocab = logits.shape
    _statistics_kernel[(rows,)](logits, targets, nll, log_partition, correct, vocab, BLOCK, num_warps=WARPS)


def gradient(logits: Tensor, targets: Tensor, log_partition: Tensor, d_nll: Tensor, d_log_partition: Tensor) -> None:
    """See `vectorized.gradient`."""
    rows, vocab = logits.shape
    grid = (rows, triton.cdiv(vocab, BLOCK))
    _gradient_kernel[grid](logits, targets, log_partition, d_nll, d_log_partition, vocab, BLOCK, num_warps=WARPS)
