"""Triton kernels of a layer's slot memory over all segments of a row at once (hksa.md, sections 2 and 4).

Nothing but its own slot and the same slot of the layer below ever reaches a slot, at the boundaries of segments either.
So a program walks one slot of one head through all N segments of a row, and everything that the slots share, the plan,
the reads, the gradients of the tokens, is done for all segments together by the kernels of `hksa`: for these the
segments of a batch are sequences of their own, number b*N + n, each with its own entering memory.

Streams s = (b*N + n)*H + h; memories have a row for each of the M slots of a stream. All else as in
hksa/forward_kernels.py.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.backward_kernels import add_reads, back_through_steps, load_back, load_read
from slotmamba_kernels.hksa.forward_kernels import (
    decay_and_write,
    load_pair,
    load_write,
    prediction_error,
    store_contents,
    store_pair,
)
from slotmamba_kernels.threading.triton_kernels import SURPRISE_FLOOR, gate_of


@triton.jit
def outlives(leaving, continues, sequence, first, last, DOCUMENTS: tl.constexpr):
    """Whether the slot's state reaches the end of a segment: its last write there does, `leaving` of the stream, or
    without a write the entering state; another document begins empty."""
    reaches = last >= first  # always: there is only one document
    if DOCUMENTS:
        left = tl.load(leaving + last - 1, mask=first < last, other=-1)
        reaches = tl.where(first < last, left >= 0, tl.load(continues + sequence) != 0)
    return reaches


@triton.jit
def threaded_forward(
    k, u_k, u_v, beta, w, log_keep, gamma, a_s, eta, bias, slope,
    order, previous, leaving, bucket, continues,
    in_k, in_v, in_z, in_surprise, below_k, below_v, below_z, below_surprise,
    entering_k, entering_v, entering_z, entering_surprise, end_k, end_v, end_z, end_surprise,
    contents, z_after, alongs, errors, surprise_after,
    L, N, M, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    STATE: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Walks a slot through the segments. entering_*, end_*: [B, N, H, M(, D)], the memories with which segments begin
    and end; with GATE a segment begins with the mix of this layer's memory and below_*, those of the layer below at the
    end of the segment before, without it with this layer's. STATE: the first begins with in_* [B, H, M(, D)]."""
    m = tl.program_id(0)
    stream = tl.program_id(1).to(tl.int64)
    b = stream // H
    h = stream % H
    d = tl.arange(0, BD)
    row = tl.arange(0, 2)
    power = tl.load(gamma + h).to(tl.float32)
    mix = tl.load(a_s + h).to(tl.float32)
    forget = 1.0 - tl.load(eta + h).to(tl.float32)
    state = tl.zeros([2, BD], tl.float32)
    z = empty_z + 0.0
    score = 0.0
    if STATE:
        memory = stream * M + m
        state = load_pair(in_k + memory * D, in_v + memory * D, row, d, True, D, BD)
        z = tl.load(in_z + memory)
        score = tl.load(in_surprise + memory)
    for n in range(N):
        sequence = b * N + n
        s = sequence * H + h
        memory = s * M + m
        store_pair(entering_k + memory * D, entering_v + memory * D, row, d, state, D, BD)
        tl.store(entering_z + memory, z)
        tl.store(entering_surprise + memory, score)
        row0 = sequence * L * H + h
        writes = s * L * K
        first = tl.load(bucket + s * (M + 1) + m)
        last = tl.load(bucket + s * (M + 1) + m + 1)
        for p in range(first, last):
            event = tl.load(order + writes + p)
            write = load_write(
                k + row0 * (NS * D), u_k + row0 * (NS * D), u_v + row0 * (NS * D), beta + row0 * NS, w + row0 * K,
                log_keep + row0 * K, event, row, d, True, H, NS, K, D, BD,
            )  # fmt: skip
            begins = tl.load(previous + writes + p) == -1
            state = tl.where(begins, 0.0, state)
            z = tl.where(begins, empty_z, z)
            score = tl.where(begins, 0.0, score)
            error = prediction_error(state, z, write, NS, D, BD)
            tl.store(errors + (writes + event) * 2 + row, error)
            score += forget * write[0] * (tl.sum(tl.where(row == 0, mix, 1.0 - mix) * error, 0) - score)
            tl.store(surprise_after + writes + event, score)
            state, z = decay_and_write(state, z, write, power, alongs + (writes + event) * (NS * 2), row, NS, True)
            store_contents(contents + writes * (2 * D), z_after + writes, event, row, d, state, z, D, BD)
        reaches = outlives(leaving + writes, continues, sequence, first, last, DOCUMENTS)
        state = tl.where(reaches, state, 0.0)
        z = tl.where(reaches, z, empty_z)
        score = tl.where(reaches, score, 0.0)
        store_pair(end_k + memory * D, end_v + memory * D, row, d, state, D, BD)
        tl.store(end_z + memory, z)
        tl.store(end_surprise + memory, score)
        if GATE:
            if n + 1 < N:
                g, rest, _ = gate_of(score, bias, slope, h)
                state = g * state + rest * load_pair(below_k + memory * D, below_v + memory * D, row, d, True, D, BD)
                z = g * z + rest * tl.load(below_z + memory)
                score = g * score + rest * tl.load(below_surprise + memory)


@triton.jit
def threaded_backward(
    q, d_o, k, beta, w, log_keep, gamma, eta, bias, slope,
    order, previous, leaving, bucket, continues, read_order, read_bucket, read_range, read_source,
    shares, d_z_read,
    below_k, below_v, below_z, below_surprise, end_k, end_v, end_z, end_surprise,
    d_end_k, d_end_v, d_end_z, d_end_surprise,
    adjoint, adjoint_z, adjoint_surprise, pulls,
    d_in_k, d_in_v, d_in_z, d_in_surprise, d_below_k, d_below_v, d_below_z, d_below_surprise, d_bias, d_slope,
    L, N, M,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    READS: tl.constexpr, STATE: tl.constexpr, GATE: tl.constexpr, DOCUMENTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Walks a slot back through the segments. ENDS: something depends on the memories at their ends, by d_end_*.
    d_bias, d_slope: [B, N, H, M], a slot's share of the gradients of the gate's parameters."""
    m = tl.program_id(0)
    stream = tl.program_id(1).to(tl.int64)
    b = stream // H
    h = stream % H
    d = tl.arange(0, BD)
    row = tl.arange(0, 2)
    power = tl.load(gamma + h).to(tl.float32)
    forget = 1.0 - tl.load(eta + h).to(tl.float32)
    grad = tl.zeros([2, BD], tl.float32)
    grad_z = 0.0
    grad_score = 0.0
    for i in range(N):
        n = N - 1 - i
        sequence = b * N + n
        s = sequence * H + h
        memory = s * M + m
        if GATE:
            # From the memory that the next segment began with, which the last one does not have: to the two mixed.
            mixed = n + 1 < N
            score = tl.load(end_surprise + memory)
            g, rest, log_surprise = gate_of(score, bias, slope, h)
            own = load_pair(end_k + memory * D, end_v + memory * D, row, d, mixed, D, BD)
            other = load_pair(below_k + memory * D, below_v + memory * D, row, d, mixed, D, BD)
            d_g = tl.sum(tl.sum(grad * (own - other), 1), 0)
            d_g += grad_z * (tl.load(end_z + memory) - tl.load(below_z + memory, mask=mixed, other=0.0))
            d_g += grad_score * (score - tl.load(below_surprise + memory, mask=mixed, other=0.0))
            d_x = d_g * g * rest
            tl.store(d_bias + memory, d_x)
            tl.store(d_slope + memory, d_x * log_surprise)
            store_pair(d_below_k + memory * D, d_below_v + memory * D, row, d, rest * grad, D, BD)
            tl.store(d_below_z + memory, rest * grad_z)
            tl.store(d_below_surprise + memory, rest * grad_score)
            grad *= g
            grad_z *= g
            grad_score = g * grad_score + d_x * tl.load(slope + h) / (score + SURPRISE_FLOOR)
        if ENDS:
            grad += load_pair(d_end_k + memory * D, d_end_v + memory * D, row, d, True, D, BD)
            grad_z += tl.load(d_end_z + memory)
            grad_score += tl.load(d_end_surprise + memory)
        row0 = sequence * L * H + h
        writes = s * L * K
        reads = s * L * KR
        first = tl.load(bucket + s * (M + 1) + m)
        last = tl.load(bucket + s * (M + 1) + m + 1)
        reaches = outlives(leaving + writes, continues, sequence, first, last, DOCUMENTS)
        grad = tl.where(reaches, grad, 0.0)
        grad_z = tl.where(reaches, grad_z, 0.0)
        grad_score = tl.where(reaches, grad_score, 0.0)
        for j in range(last - first):
            p = last - 1 - j
            event = tl.load(order + writes + p)
            write = load_back(
                q + row0 * D, d_o + row0 * D, k + row0 * (NS * D), beta + row0 * NS, w + row0 * K,
                log_keep + row0 * K, order + writes, read_order + reads, read_range + writes * 2, shares + reads * 2,
                d_z_read + reads, p, row, d, True, H, NS, K, KR, D, BD, READS,
            )  # fmt: skip
            seen = read_range + (writes + p) * 2
            more = tl.load(seen) + READS
            grad, grad_z = add_reads(
                grad, grad_z, write, q + row0 * D, d_o + row0 * D, shares + reads * 2, d_z_read + reads,
                read_order + reads, more, tl.load(seen + 1), row, d, H, NS, KR, D, BD, READS,
            )  # fmt: skip
            here = adjoint + (writes + event) * (2 * D)
            store_pair(here, here + D, row, d, grad, D, BD, "evict_first")
            tl.store(adjoint_z + writes + event, grad_z)
            tl.store(adjoint_surprise + writes + event, grad_score)
            grad = back_through_steps(grad, write, pulls + (writes + event) * (NS * 2), row, NS, True)
            begins = tl.load(previous + writes + p) == -1
            decay = tl.where(begins, 0.0, tl.exp(power * write[1]))
            grad *= decay
            grad_z *= decay
            grad_score *= tl.where(begins, 0.0, 1.0 - forget * write[0])
        # Reads of the memory that the segment begins with come before all others of the slot.
        number = tl.load(read_bucket + s * (M + 1) + m)
        last_read = tl.load(read_bucket + s * (M + 1) + m + 1)
        while number < last_read:
            read = tl.load(read_order + reads + number)
            if tl.load(read_source + (row0 + read // KR * H) * KR + read % KR) <= -2:
                seen_by = load_read(
                    q + row0 * D, d_o + row0 * D, shares + reads * 2, d_z_read + reads, read_order + reads, number, row,
                    d, True, H, KR, D, BD,
                )  # fmt: skip
                grad += seen_by[1][:, None] * seen_by[0].to(tl.float32)
                grad_z += seen_by[2]
                number += 1
            else:
                number = last_read
    if STATE:
        memory = stream * M + m
        store_pair(d_in_k + memory * D, d_in_v + memory * D, row, d, grad, D, BD)
        tl.store(d_in_z + memory, grad_z)
        tl.store(d_in_surprise + memory, grad_score)
