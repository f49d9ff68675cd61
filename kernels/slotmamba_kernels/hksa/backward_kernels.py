"""Triton kernels of HKSA's backward pass (hksa.md section 7); conventions as in forward_kernels.py.

The adjoint that a read puts on the state it saw is a multiple of q on key memory and of the output's gradient on value
memory, so `read_backward` leaves three numbers a read. `chain_backward` walks each chain from its end, adds these up
and stores the adjoint of the state after each write; it needs no states. `token_backward` in token_kernels.py does the
rest. Nothing is added up by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.forward_kernels import (
    MIN_READ_WEIGHT,
    load_contents,
    load_pair,
    store_pair,
    take,
    token_of_program,
)
from slotmamba_kernels.hksa.split_kernels import range_of_program


@triton.jit
def read_backward(
    q, w, source, contents, z_after, in_k, in_v, in_z, d_o,
    d_q, d_w, shares, d_z,
    start, T, L, events, R_in, empty_z, scale,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    """Gradients of q and of the read weights; shares [S, L*K, 2], d_z [S, L*K]: the adjoint of the state that a read
    saw is shares[0] * q of key memory, shares[1] * d_o of value memory and, of its normaliser, d_z."""
    t, h, b, s = token_of_program(H)
    row = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    i = tl.arange(0, BK)
    pointer = tl.load(source + ((b * L + t) * H + h) * K + i, mask=i < K, other=-1)
    query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    grad = tl.load(d_o + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(w + row * K + i, mask=i < K, other=1.0).to(tl.float32)
    held_k, held_v, z = load_contents(
        contents, z_after, in_k, in_v, in_z, pointer, s, events, R_in, empty_z, d, i < K, D, BD, ENTERING
    )
    clamped = tl.maximum(weight, MIN_READ_WEIGHT)
    similarity = tl.sum(held_k * query[None, :], 1) * scale
    score = tl.where(i < K, similarity + tl.log(clamped), float("-inf"))
    p = tl.exp(score - tl.max(score, 0))
    p /= tl.sum(p, 0)
    d_p = tl.sum(held_v * grad[None, :], 1)
    d_score = p * (d_p - tl.sum(p * d_p, 0))
    d_query = tl.sum(held_k * d_score[:, None], 0) * scale
    tl.store(d_q + row * D + d, d_query.to(d_q.dtype.element_ty), mask=d < D)
    tl.store(d_w + row * K + i, tl.where(weight >= MIN_READ_WEIGHT, d_score / clamped, 0.0), mask=i < K)
    read = (s * L + t) * K + i
    # A read of an empty slot puts nothing on the state of an earlier document that it follows in the plan.
    share = tl.where(pointer == -1, 0.0, 1.0 / z)
    tl.store(shares + read * 2, d_score * scale * share, mask=i < K)
    tl.store(shares + read * 2 + 1, p * share, mask=i < K)
    tl.store(d_z + read, -(d_score * similarity + p * d_p) * share, mask=i < K)


@triton.jit
def load_read(
    q, d_o, shares, d_z_read, read_order, number, row, d, seen,
    H: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The adjoint that read `number` of the sorted reads puts on the state it saw, a flat tuple: q and d_o [2, BD] in
    their dtype, their factors [2], and of the normaliser; zeros if not seen."""
    read = tl.load(read_order + number, mask=seen, other=0)
    offset = (read // KR) * (H * D)
    return (
        load_pair(q + offset, d_o + offset, row, d, seen, D, BD),
        tl.load(shares + read * 2 + row, mask=seen, other=0.0),
        tl.load(d_z_read + read, mask=seen, other=0.0),
    )


@triton.jit
def load_back(
    q, d_o, k, beta, w, log_keep, order, read_order, read_range, shares, d_z_read, p, row, d, live,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """What going back through the write at position p needs, a flat tuple: its weight and log(1 - weight), beta_j and
    k_j [2, BD] (twice) of each step, then `load_read` of the first READS reads of the state after it."""
    event = tl.load(order + p, mask=live, other=0)
    token = event // K
    at = token * (H * K) + event % K
    write = (tl.load(w + at, mask=live, other=0.0).to(tl.float32), tl.load(log_keep + at, mask=live, other=0.0))
    for j in tl.static_range(NS):
        offset = token * (H * NS * D) + j * D
        write = write + (
            tl.load(beta + token * (H * NS) + j, mask=live, other=0.0).to(tl.float32),
            load_pair(k + offset, k + offset, row, d, live, D, BD),
        )
    first = tl.load(read_range + p * 2, mask=live, other=0)
    last = tl.load(read_range + p * 2 + 1, mask=live, other=0)
    for r in tl.static_range(READS):
        write = write + load_read(
            q, d_o, shares, d_z_read, read_order, first + r, row, d, first + r < last, H, KR, D, BD
        )  # fmt: skip
    return write


@triton.jit
def add_reads(
    grad, grad_z, write, q, d_o, shares, d_z_read, read_order, first, last, row, d,
    H: tl.constexpr, NS: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Adds the adjoints of the reads of a state: the READS that `load_back` loaded with its write, and all others, of
    numbers [first, last)."""
    for r in tl.static_range(READS):
        grad += write[3 * r + 3 + 2 * NS][:, None] * write[3 * r + 2 + 2 * NS].to(tl.float32)
        grad_z += write[3 * r + 4 + 2 * NS]
    for number in range(first, last):
        more = load_read(q, d_o, shares, d_z_read, read_order, number, row, d, True, H, KR, D, BD)
        grad += more[1][:, None] * more[0].to(tl.float32)
        grad_z += more[2]
    return grad, grad_z


@triton.jit
def back_through_steps(grad, write, pulls, row, NS: tl.constexpr, STORE: tl.constexpr):
    """Adjoint before the Householder steps of a write; with STORE pulls [n, 2] of the write are kept."""
    for j in tl.static_range(NS - 1, -1, -1):
        key = write[2 * j + 3].to(tl.float32)
        pull = tl.sum(key * grad, 1)
        grad -= key * (write[0] * write[2 * j + 2] * pull)[:, None]
        if STORE:
            tl.store(pulls + j * 2 + row, pull)
    return grad


@triton.jit
def chain_backward(
    q, d_o, k, beta, w, log_keep, gamma,
    order, previous, leaving, bucket, block_begin, block_range, read_order, read_range,
    shares, d_z_read,
    c_k, c_v, lam_k, lam_v,
    d_out_k, d_out_v, d_out_z,
    adjoint, adjoint_z, pulls,
    d_in_k, d_in_v, d_in_z, block_grads, block_grads_z,
    start, T, L, R_in, R_out, buckets, capacity,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    READS: tl.constexpr, ENTERING: tl.constexpr, LEAVING: tl.constexpr, INJECT: tl.constexpr, DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, PROBE: tl.constexpr,
):  # fmt: skip
    """Walks the writes of a bucket, or with SPLIT of a block of a long one, backwards. adjoint [S, L*K, 2, D],
    adjoint_z [S, L*K]: of the state after each write; pulls [S, L*K, n, 2]: k_j . adjoint after each step, of key and
    value memory; d_in_*: of the entering memory's rows that a chain starts from. READS of a state are loaded with its
    write; DEPTH, SPLIT and PROBE as in chain_forward, block_grads and block_grads_z holding adjoints: of the
    state after a block, in a probe of that before it."""
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    row = tl.arange(0, 2)
    first, last, block = range_of_program(bucket, block_begin, block_range, s, buckets, capacity, SPLIT, PROBE)
    power = tl.load(gamma + h).to(tl.float32)
    row0 = (b * T + start) * H + h
    k += row0 * (NS * D)
    q += row0 * D
    d_o += row0 * D
    beta += row0 * NS
    w += row0 * K
    log_keep += (b * L * H + h) * K
    writes = s * L * K
    reads = s * L * KR
    order += writes
    previous += writes
    read_range += writes * 2
    adjoint += writes * (2 * D)
    adjoint_z += writes
    pulls += writes * (2 * NS)
    read_order += reads
    shares += reads * 2
    d_z_read += reads

    grad = tl.zeros([2, BD], tl.float32)
    grad_z = 0.0
    at_block = s * capacity + block
    if SPLIT and not PROBE:
        if (block >= 0) & (first < last):
            at_end = block_grads + at_block * (2 * D)
            grad = load_pair(at_end, at_end + D, row, d, True, D, BD)
            grad_z = tl.load(block_grads_z + at_block)
    event = tl.load(order + last - 1, mask=first < last, other=0)
    ahead = ()
    for x in tl.static_range(DEPTH):
        ahead = ahead + load_back(
            q, d_o, k, beta, w, log_keep, order, read_order, read_range, shares, d_z_read,
            last - 1 - x, row, d, last - 1 - x >= first, H, NS, K, KR, D, BD, READS,
        )  # fmt: skip
    for i in range(last - first):
        p = last - 1 - i
        next_event = tl.load(order + p - 1, mask=p > first, other=0)
        source = tl.load(previous + p)
        if DEPTH > 0:
            write = take(ahead, 0, 2 + 2 * NS + 3 * READS)
            new = load_back(
                q, d_o, k, beta, w, log_keep, order, read_order, read_range, shares, d_z_read,
                p - DEPTH, row, d, p - DEPTH >= first, H, NS, K, KR, D, BD, READS,
            )  # fmt: skip
            ahead = take(ahead, 2 + 2 * NS + 3 * READS, (DEPTH - 1) * (2 + 2 * NS + 3 * READS)) + new
        else:
            write = load_back(
                q, d_o, k, beta, w, log_keep, order, read_order, read_range, shares, d_z_read,
                p, row, d, True, H, NS, K, KR, D, BD, READS,
            )  # fmt: skip
        weight = write[0]
        if LEAVING:
            left = tl.load(leaving + writes + p)
            if left >= 0:
                memory = s * R_out + left
                grad += load_pair(d_out_k + memory * D, d_out_v + memory * D, row, d, True, D, BD)
                grad_z += tl.load(d_out_z + memory)
        # The range is loaded in this iteration on purpose: a loop whose bound comes from values carried from one
        # iteration to the next is lowered wrongly by Triton 3.6 and 3.7, to the bound of the first iteration.
        more = tl.load(read_range + p * 2) + READS
        grad, grad_z = add_reads(
            grad, grad_z, write, q, d_o, shares, d_z_read, read_order, more, tl.load(read_range + p * 2 + 1), row, d,
            H, NS, KR, D, BD, READS,
        )  # fmt: skip

        if not PROBE:
            here = adjoint + event * (2 * D)
            store_pair(here, here + D, row, d, grad, D, BD, "evict_first")
            tl.store(adjoint_z + event, grad_z)
        if INJECT:
            at = (row0 + event // K * H) * K + event % K
            share = tl.load(tl.where(row == 0, lam_k, lam_v) + at).to(tl.float32)
            share = tl.where(weight > 0.0, share, 0.0)
            injected = load_pair(c_k + at * D, c_v + at * D, row, d, True, D, BD).to(tl.float32)
            grad_z += tl.sum(share * tl.sum(grad * injected, 1), 0)
            grad *= (1.0 - share)[:, None]
        grad = back_through_steps(grad, write, pulls + event * (NS * 2), row, NS, not PROBE)
        decay = tl.exp(power * write[1])
        if ENTERING and not PROBE:
            if source <= -2:
                memory = s * R_in + (-2 - source)
                store_pair(d_in_k + memory * D, d_in_v + memory * D, row, d, grad * decay, D, BD)
                tl.store(d_in_z + memory, grad_z * decay)
        decay = tl.where(source >= 0, decay, 0.0)  # 0 if the state before is none that an earlier write left
        grad *= decay
        grad_z *= decay
        event = next_event
    if PROBE:
        if first < last:
            at_end = block_grads + at_block * (2 * D)
            store_pair(at_end, at_end + D, row, d, grad, D, BD)
            tl.store(block_grads_z + at_block, grad_z)


@triton.jit
def entering_backward(
    q, d_o, source, bucket, read_order, shares, d_z_read, d_in_k, d_in_v, d_in_z,
    start, T, L, R_in, buckets,
    H: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ONE_SLOT: tl.constexpr,
):  # fmt: skip
    """Adds the adjoints that reads of the entering memory put on it. A row belongs to one bucket, so to one program.

    ONE_SLOT: buckets hold one slot each, whose reads of the entering memory come before all of its others.
    """
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    at = bucket + s * (buckets + 1) + tl.program_id(0)
    i = tl.load(at)
    last = tl.load(at + 1)
    while i < last:
        read = tl.load(read_order + s * L * KR + i)
        token = read // KR
        pointer = tl.load(source + ((b * L + token) * H + h) * KR + read % KR)
        if pointer <= -2:
            memory = s * R_in + (-2 - pointer)
            row = (b * T + start + token) * H + h
            share = s * L * KR + read
            here = memory * D + d
            query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            grad = tl.load(d_o + row * D + d, mask=d < D, other=0.0).to(tl.float32)
            sum_k = tl.load(d_in_k + here, mask=d < D, other=0.0) + tl.load(shares + share * 2) * query
            sum_v = tl.load(d_in_v + here, mask=d < D, other=0.0) + tl.load(shares + share * 2 + 1) * grad
            tl.store(d_in_k + here, sum_k, mask=d < D)
            tl.store(d_in_v + here, sum_v, mask=d < D)
            sum_z = tl.load(d_in_z + memory) + tl.load(d_z_read + share)
            tl.debug_barrier()  # every thread has read z before one of them writes it
            tl.store(d_in_z + memory, sum_z)
            tl.debug_barrier()
            i += 1
        else:
            i = last if ONE_SLOT else i + 1
