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
    load_vectors,
    log1p_minus,
    store_vectors,
    take,
)


@triton.jit
def read_backward(
    q, w, source, contents, z_after, in_k, in_v, in_z, d_o,
    d_q, d_w, key_share, value_share, d_z,
    start, T, L, events, R_in, empty_z, scale,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    """Gradients of q and of the read weights; key_share, value_share, d_z [S, L*K]: the adjoint of the state that a
    read saw is key_share * q, value_share * d_o and, of its normaliser, d_z."""
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    row = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    i = tl.arange(0, BK)
    pointer = tl.load(source + ((b * L + t) * H + h) * K + i, mask=i < K, other=-1)
    held_k, held_v, z = load_contents(
        contents, z_after, in_k, in_v, in_z, pointer, s, events, R_in, empty_z, d, i < K, D, BD, ENTERING
    )
    query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    grad = tl.load(d_o + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(w + row * K + i, mask=i < K, other=1.0).to(tl.float32)
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
    tl.store(key_share + read, d_score * scale * share, mask=i < K)
    tl.store(value_share + read, p * share, mask=i < K)
    tl.store(d_z + read, -(d_score * similarity + p * d_p) * share, mask=i < K)


@triton.jit
def load_reads(
    q, d_o, key_share, value_share, d_z_read, read, seen, d,
    H: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of reads [C, READS]: q and the gradient of the output [C, READS, BD], and the three numbers of read_backward."""
    at = ((read // KR) * (H * D))[:, :, None] + d[None, None, :]
    mask = seen[:, :, None] if D == BD else seen[:, :, None] & (d[None, None, :] < D)
    return (
        tl.load(q + at, mask=mask, other=0.0),
        tl.load(d_o + at, mask=mask, other=0.0),
        tl.load(key_share + read, mask=seen, other=0.0),
        tl.load(value_share + read, mask=seen, other=0.0),
        tl.load(d_z_read + read, mask=seen, other=0.0),
    )


@triton.jit
def load_back(
    q, d_o, k, beta, w, order, read_order, read_range, key_share, value_share, d_z_read, p, live, d,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """What going back through the writes at positions p needs, a flat tuple: their weight, beta_j and k_j of each step,
    then `load_reads` of the first READS reads of the state after each."""
    event = tl.load(order + p, mask=live, other=0)
    token = event // K
    write = (tl.load(w + token * (H * K) + event % K, mask=live, other=0.0).to(tl.float32),)
    for j in tl.static_range(NS):
        write = write + (
            tl.load(beta + token * (H * NS) + j, mask=live, other=0.0).to(tl.float32),
            load_vectors(k, token * (H * NS * D) + j * D, d, live, D, BD),
        )
    first = tl.load(read_range + p * 2, mask=live, other=0)
    last = tl.load(read_range + p * 2 + 1, mask=live, other=0)
    which = first[:, None] + tl.arange(0, READS)[None, :]
    seen = which < last[:, None]
    read = tl.load(read_order + which, mask=seen, other=0)
    return write + load_reads(q, d_o, key_share, value_share, d_z_read, read, seen, d, H, KR, D, BD)


@triton.jit
def chain_backward(
    q, d_o, k, beta, w, gamma, eta,
    order, previous, leaving, bucket, read_order, read_range,
    key_share, value_share, d_z_read,
    c_k, c_v, lam_k, lam_v,
    d_out_k, d_out_v, d_out_z, d_out_surprise,
    adjoint, adjoint_z, pulls, adjoint_surprise,
    d_in_k, d_in_v, d_in_z, d_in_surprise,
    start, T, L, R_in, R_out, buckets,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    C: tl.constexpr, READS: tl.constexpr,
    ENTERING: tl.constexpr, LEAVING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Walks the writes of C buckets backwards. adjoint [S, L*K, 2, D], adjoint_z, adjoint_surprise [S, L*K]: of the
    state after each write; pulls [S, L*K, n, 2]: k_j . adjoint after each step, of key and value memory; d_in_*: of the
    entering memory's rows that a chain starts from. Reads are added up READS at a time; DEPTH as in chain_forward."""
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    nb = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.load(bucket + s * (buckets + 1) + nb, mask=nb < buckets, other=0)
    last = tl.load(bucket + s * (buckets + 1) + nb + 1, mask=nb < buckets, other=0)
    power = tl.load(gamma + h).to(tl.float32)
    gk = tl.zeros([C, BD], tl.float32)
    gv = tl.zeros([C, BD], tl.float32)
    gz = tl.zeros([C], tl.float32)
    gs = tl.zeros([C], tl.float32)
    continued = first > last  # whether the write after this one goes on from its state: none has been seen yet

    row0 = (b * T + start) * H + h
    k += row0 * (NS * D)
    q += row0 * D
    d_o += row0 * D
    beta += row0 * NS
    w += row0 * K
    writes = s * L * K
    reads = s * L * KR
    order += writes
    previous += writes
    read_range += writes * 2
    adjoint += writes * (2 * D)
    adjoint_z += writes
    pulls += writes * (2 * NS)
    read_order += reads
    key_share += reads
    value_share += reads
    d_z_read += reads
    event = tl.load(order + last - 1, mask=first < last, other=0)
    source = tl.load(previous + last - 1, mask=first < last, other=-1)
    ahead = ()
    for x in tl.static_range(DEPTH):
        ahead = ahead + load_back(
            q, d_o, k, beta, w, order, read_order, read_range, key_share, value_share, d_z_read,
            last - 1 - x, last - 1 - x >= first, d, H, NS, K, KR, D, BD, READS,
        )  # fmt: skip
    longest = tl.max(last - first, 0)
    for i in range(longest):
        p = last - 1 - i
        live = p >= first
        next_event = tl.load(order + p - 1, mask=p - 1 >= first, other=0)
        next_source = tl.load(previous + p - 1, mask=p - 1 >= first, other=-1)
        # The range is loaded in this iteration on purpose: a loop whose bound comes from values carried from one
        # iteration to the next is lowered wrongly by Triton 3.6 and 3.7, to the bound of the first iteration.
        read_first = tl.load(read_range + p * 2, mask=live, other=0)
        read_last = tl.load(read_range + p * 2 + 1, mask=live, other=0)
        if DEPTH > 0:
            write = take(ahead, 0, 6 + 2 * NS)
            new = load_back(
                q, d_o, k, beta, w, order, read_order, read_range, key_share, value_share, d_z_read,
                p - DEPTH, p - DEPTH >= first, d, H, NS, K, KR, D, BD, READS,
            )  # fmt: skip
            ahead = take(ahead, 6 + 2 * NS, (DEPTH - 1) * (6 + 2 * NS)) + new
        else:
            write = load_back(
                q, d_o, k, beta, w, order, read_order, read_range, key_share, value_share, d_z_read,
                p, live, d, H, NS, K, KR, D, BD, READS,
            )  # fmt: skip
        seen = take(write, 1 + 2 * NS, 5)
        weight = write[0]

        gk = tl.where(continued[:, None], gk, 0.0)
        gv = tl.where(continued[:, None], gv, 0.0)
        gz = tl.where(continued, gz, 0.0)
        gs = tl.where(continued, gs, 0.0)
        if LEAVING:
            left = tl.load(leaving + writes + p, mask=live, other=-1)
            leaves = left >= 0
            if tl.max(leaves.to(tl.int32), 0) > 0:
                memory = s * R_out + left
                gk += load_vectors(d_out_k, memory * D, d, leaves, D, BD)
                gv += load_vectors(d_out_v, memory * D, d, leaves, D, BD)
                gz += tl.load(d_out_z + memory, mask=leaves, other=0.0)
                if SURPRISE:
                    gs += tl.load(d_out_surprise + memory, mask=leaves, other=0.0)

        gk += tl.sum(seen[2][:, :, None] * seen[0].to(tl.float32), 1)
        gv += tl.sum(seen[3][:, :, None] * seen[1].to(tl.float32), 1)
        gz += tl.sum(seen[4], 1)
        most = tl.max(read_last - read_first, 0)
        for r in range(READS, most, READS):
            which = read_first[:, None] + r + tl.arange(0, READS)[None, :]
            mask = which < read_last[:, None]
            more = tl.load(read_order + which, mask=mask, other=0)
            seen = load_reads(q, d_o, key_share, value_share, d_z_read, more, mask, d, H, KR, D, BD)
            gk += tl.sum(seen[2][:, :, None] * seen[0].to(tl.float32), 1)
            gv += tl.sum(seen[3][:, :, None] * seen[1].to(tl.float32), 1)
            gz += tl.sum(seen[4], 1)

        store_vectors(adjoint, event * (2 * D), d, live, gk, D, BD)
        store_vectors(adjoint, event * (2 * D) + D, d, live, gv, D, BD)
        tl.store(adjoint_z + event, gz, mask=live)
        if INJECT:
            at = (row0 + event // K * H) * K + event % K
            share_k = tl.where(weight > 0.0, tl.load(lam_k + at, mask=live, other=0.0).to(tl.float32), 0.0)
            share_v = tl.where(weight > 0.0, tl.load(lam_v + at, mask=live, other=0.0).to(tl.float32), 0.0)
            injected_k = load_vectors(c_k, at * D, d, live, D, BD).to(tl.float32)
            injected_v = load_vectors(c_v, at * D, d, live, D, BD).to(tl.float32)
            gz += share_k * tl.sum(gk * injected_k, 1) + share_v * tl.sum(gv * injected_v, 1)
            gk *= (1.0 - share_k)[:, None]
            gv *= (1.0 - share_v)[:, None]
        for j in tl.static_range(NS - 1, -1, -1):
            key = write[2 * j + 2].to(tl.float32)
            step = weight * write[2 * j + 1]
            pull_k = tl.sum(key * gk, 1)
            pull_v = tl.sum(key * gv, 1)
            gk -= key * (step * pull_k)[:, None]
            gv -= key * (step * pull_v)[:, None]
            tl.store(pulls + (event * NS + j) * 2, pull_k, mask=live)
            tl.store(pulls + (event * NS + j) * 2 + 1, pull_v, mask=live)
        decay = tl.exp(power * log1p_minus(weight))
        gk *= decay[:, None]
        gv *= decay[:, None]
        gz *= decay
        if SURPRISE:
            tl.store(adjoint_surprise + writes + event, gs, mask=live)
            gs *= 1.0 - (1.0 - tl.load(eta + h).to(tl.float32)) * weight
        if ENTERING:
            enters = live & (source <= -2)
            if tl.max(enters.to(tl.int32), 0) > 0:
                memory = s * R_in + (-2 - source)
                store_vectors(d_in_k, memory * D, d, enters, gk, D, BD)
                store_vectors(d_in_v, memory * D, d, enters, gv, D, BD)
                tl.store(d_in_z + memory, gz, mask=enters)
                if SURPRISE:
                    tl.store(d_in_surprise + memory, gs, mask=enters)
        continued = live & (source >= 0)
        event = next_event
        source = next_source


@triton.jit
def entering_backward(
    q, d_o, source, bucket, read_order, key_share, value_share, d_z_read, d_in_k, d_in_v, d_in_z,
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
            sum_k = tl.load(d_in_k + here, mask=d < D, other=0.0) + tl.load(key_share + share) * query
            sum_v = tl.load(d_in_v + here, mask=d < D, other=0.0) + tl.load(value_share + share) * grad
            tl.store(d_in_k + here, sum_k, mask=d < D)
            tl.store(d_in_v + here, sum_v, mask=d < D)
            sum_z = tl.load(d_in_z + memory) + tl.load(d_z_read + share)
            tl.debug_barrier()  # every thread has read z before one of them writes it
            tl.store(d_in_z + memory, sum_z)
            tl.debug_barrier()
            i += 1
        else:
            i = last if ONE_SLOT else i + 1
