"""Triton kernels of HKSA's backward pass (hksa.md section 7); conventions as in forward_kernels.py.

The adjoint that a read puts on the state it saw is a multiple of q on key memory and of the output's gradient on value
memory, so `read_backward` leaves three numbers a read. `chain_backward` walks each chain from its end, adds these up
and stores the adjoint of the state after each write; it needs no states. `token_backward` turns each token's K pairs
of (state before, adjoint after) into the gradients of its inputs. Nothing is added up by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.forward_kernels import (
    MIN_READ_WEIGHT,
    load_contents,
    load_steps,
    log1p_minus,
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
        contents, z_after, in_k, in_v, in_z, pointer, s, events, R_in, empty_z, d, i < K, D, ENTERING
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
def chain_backward(
    q, d_o, k, beta, w, gamma, eta,
    order, previous, leaving, bucket, read_order, read_range,
    key_share, value_share, d_z_read,
    c_k, c_v, lam_k, lam_v,
    d_out_k, d_out_v, d_out_z, d_out_surprise,
    adjoint, adjoint_z, adjoint_surprise,
    d_in_k, d_in_v, d_in_z, d_in_surprise,
    start, T, L, R_in, R_out, buckets,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, KR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    C: tl.constexpr, READS: tl.constexpr,
    ENTERING: tl.constexpr, LEAVING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """Walks the writes of C buckets backwards. adjoint [S, L*K, 2, D], adjoint_z, adjoint_surprise [S, L*K]: of the
    state after each write; d_in_*: of the entering memory's rows that a chain starts from."""
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    in_d = d[None, :] < D
    nb = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.load(bucket + s * (buckets + 1) + nb, mask=nb < buckets, other=0)
    last = tl.load(bucket + s * (buckets + 1) + nb + 1, mask=nb < buckets, other=0)
    power = tl.load(gamma + h).to(tl.float32)
    gk = tl.zeros([C, BD], tl.float32)
    gv = tl.zeros([C, BD], tl.float32)
    gz = tl.zeros([C], tl.float32)
    gs = tl.zeros([C], tl.float32)
    continued = first > last  # whether the write after this one goes on from its state: none has been seen yet

    writes = s * L * K
    reads = s * L * KR
    token0 = b * T + start
    live = first < last
    event = tl.load(order + writes + last - 1, mask=live, other=0)
    row = (token0 + event // K) * H + h
    keys = ()
    for j in tl.static_range(NS):
        keys = keys + (load_steps(k, row, j, d, live[:, None] & in_d, NS, D),)
    longest = tl.max(last - first, 0)
    for i in range(longest):
        p = last - 1 - i
        live = p >= first
        next_live = p - 1 >= first
        next_event = tl.load(order + writes + p - 1, mask=next_live, other=0)
        next_row = (token0 + next_event // K) * H + h
        current = keys
        keys = ()
        for j in tl.static_range(NS):
            keys = keys + (load_steps(k, next_row, j, d, next_live[:, None] & in_d, NS, D),)

        source = tl.load(previous + writes + p, mask=live, other=-1)
        weight = tl.load(w + row * K + event % K, mask=live, other=0.0).to(tl.float32)
        gk = tl.where(continued[:, None], gk, 0.0)
        gv = tl.where(continued[:, None], gv, 0.0)
        gz = tl.where(continued, gz, 0.0)
        gs = tl.where(continued, gs, 0.0)
        if LEAVING:
            left = tl.load(leaving + writes + p, mask=live, other=-1)
            leaves = left >= 0
            if tl.max(leaves.to(tl.int32), 0) > 0:
                memory = s * R_out + left
                mask = leaves[:, None] & in_d
                gk += tl.load(d_out_k + (memory * D)[:, None] + d[None, :], mask=mask, other=0.0)
                gv += tl.load(d_out_v + (memory * D)[:, None] + d[None, :], mask=mask, other=0.0)
                gz += tl.load(d_out_z + memory, mask=leaves, other=0.0)
                if SURPRISE:
                    gs += tl.load(d_out_surprise + memory, mask=leaves, other=0.0)

        read_first = tl.load(read_range + (writes + p) * 2, mask=live, other=0)
        read_last = tl.load(read_range + (writes + p) * 2 + 1, mask=live, other=0)
        for r in range(0, tl.max(read_last - read_first, 0), READS):
            which = read_first[:, None] + r + tl.arange(0, READS)[None, :]  # [C, READS]
            seen = which < read_last[:, None]
            read = tl.load(read_order + reads + which, mask=seen, other=0)
            read_row = (token0 + read // KR) * H + h
            mask = seen[:, :, None] & (d[None, None, :] < D)
            at = (read_row * D)[:, :, None] + d[None, None, :]
            share_k = tl.load(key_share + reads + read, mask=seen, other=0.0)
            share_v = tl.load(value_share + reads + read, mask=seen, other=0.0)
            gk += tl.sum(share_k[:, :, None] * tl.load(q + at, mask=mask, other=0.0).to(tl.float32), 1)
            gv += tl.sum(share_v[:, :, None] * tl.load(d_o + at, mask=mask, other=0.0).to(tl.float32), 1)
            gz += tl.sum(tl.load(d_z_read + reads + read, mask=seen, other=0.0), 1)

        at = adjoint + ((writes + event) * (2 * D))[:, None] + d[None, :]
        tl.store(at, gk.to(adjoint.dtype.element_ty), mask=live[:, None] & in_d)
        tl.store(at + D, gv.to(adjoint.dtype.element_ty), mask=live[:, None] & in_d)
        tl.store(adjoint_z + writes + event, gz, mask=live)
        if INJECT:
            at = row * K + event % K
            mask = live[:, None] & in_d
            share_k = tl.where(weight > 0.0, tl.load(lam_k + at, mask=live, other=0.0).to(tl.float32), 0.0)
            share_v = tl.where(weight > 0.0, tl.load(lam_v + at, mask=live, other=0.0).to(tl.float32), 0.0)
            injected_k = tl.load(c_k + (at * D)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            injected_v = tl.load(c_v + (at * D)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            gz += share_k * tl.sum(gk * injected_k, 1) + share_v * tl.sum(gv * injected_v, 1)
            gk *= (1.0 - share_k)[:, None]
            gv *= (1.0 - share_v)[:, None]
        for j in tl.static_range(NS - 1, -1, -1):
            key = current[j].to(tl.float32)
            size = tl.load(beta + row * NS + j, mask=live, other=0.0).to(tl.float32)
            step = weight * size
            along_k = (step * tl.sum(key * gk, 1))[:, None]
            along_v = (step * tl.sum(key * gv, 1))[:, None]
            gk -= key * along_k
            gv -= key * along_v
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
                mask = enters[:, None] & in_d
                tl.store(d_in_k + (memory * D)[:, None] + d[None, :], gk, mask=mask)
                tl.store(d_in_v + (memory * D)[:, None] + d[None, :], gv, mask=mask)
                tl.store(d_in_z + memory, gz, mask=enters)
                if SURPRISE:
                    tl.store(d_in_surprise + memory, gs, mask=enters)
        continued = live & (source >= 0)
        event = next_event
        row = next_row


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


@triton.jit
def token_backward(
    k, u_k, u_v, beta, w, gamma, a_s, eta,
    source, contents, z_after, surprise_after, errors, in_k, in_v, in_z, in_surprise,
    adjoint, adjoint_z, adjoint_surprise,
    c_k, c_v, lam_k, lam_v,
    d_k, d_u_k, d_u_v, d_beta, d_w, d_gamma, d_a_s, d_eta, d_c_k, d_c_v, d_lam_k, d_lam_v,
    start, T, L, R_in, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ENTERING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """One token of one stream. d_gamma, d_a_s, d_eta [S, L]: the token's share of the gradients of head parameters."""
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    row = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    i = tl.arange(0, BK)
    in_k_slots = i < K
    pointer = tl.load(source + ((b * L + t) * H + h) * K + i, mask=in_k_slots, other=-1)
    held_k, held_v, z = load_contents(
        contents, z_after, in_k, in_v, in_z, pointer, s, L * K, R_in, empty_z, d, in_k_slots, D, ENTERING
    )
    before_k = held_k * z[:, None]
    before_v = held_v * z[:, None]
    weight = tl.load(w + row * K + i, mask=in_k_slots, other=0.0).to(tl.float32)
    power = tl.load(gamma + h).to(tl.float32)
    log_keep = log1p_minus(weight)
    decay = tl.exp(power * log_keep)
    event = (s * L + t) * K + i
    mask = in_k_slots[:, None] & (d[None, :] < D)
    at = adjoint + (event * (2 * D))[:, None] + d[None, :]
    gk = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gv = tl.load(at + D, mask=mask, other=0.0).to(tl.float32)
    gz = tl.load(adjoint_z + event, mask=in_k_slots, other=0.0)

    # Forward once more, from the state before to the state after the Householder steps.
    sk = before_k * decay[:, None]
    sv = before_v * decay[:, None]
    alongs_k = ()
    alongs_v = ()
    for j in tl.static_range(NS):
        in_row = (row * NS + j) * D + d
        key = tl.load(k + in_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        step = (weight * tl.load(beta + row * NS + j).to(tl.float32))[:, None]
        along_k = tl.sum(sk * key, 1)
        along_v = tl.sum(sv * key, 1)
        alongs_k = alongs_k + (along_k,)
        alongs_v = alongs_v + (along_v,)
        u = tl.load(u_k + in_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        sk += step * (u - key * along_k[:, None])
        u = tl.load(u_v + in_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        sv += step * (u - key * along_v[:, None])

    if INJECT:
        slot = row * K + i
        share_k = tl.where(weight > 0.0, tl.load(lam_k + slot, mask=in_k_slots, other=0.0).to(tl.float32), 0.0)
        share_v = tl.where(weight > 0.0, tl.load(lam_v + slot, mask=in_k_slots, other=0.0).to(tl.float32), 0.0)
        vectors = (slot * D)[:, None] + d[None, :]
        injected_k = tl.load(c_k + vectors, mask=mask, other=0.0).to(tl.float32)
        injected_v = tl.load(c_v + vectors, mask=mask, other=0.0).to(tl.float32)
        z_now = decay * z + weight
        tl.store(d_c_k + vectors, ((share_k * z_now)[:, None] * gk).to(d_c_k.dtype.element_ty), mask=mask)
        tl.store(d_c_v + vectors, ((share_v * z_now)[:, None] * gv).to(d_c_v.dtype.element_ty), mask=mask)
        along_k = tl.sum(gk * injected_k, 1)
        along_v = tl.sum(gv * injected_v, 1)
        d_share_k = z_now * along_k - tl.sum(gk * sk, 1)
        d_share_v = z_now * along_v - tl.sum(gv * sv, 1)
        tl.store(d_lam_k + slot, tl.where(weight > 0.0, d_share_k, 0.0), mask=in_k_slots)
        tl.store(d_lam_v + slot, tl.where(weight > 0.0, d_share_v, 0.0), mask=in_k_slots)
        gz += share_k * along_k + share_v * along_v
        gk *= (1.0 - share_k)[:, None]
        gv *= (1.0 - share_v)[:, None]

    # Back through the steps. The state before a step is the one after it less what the step added.
    d_weight = gz
    for j in tl.static_range(NS - 1, -1, -1):
        in_row = (row * NS + j) * D + d
        key = tl.load(k + in_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        write_k = tl.load(u_k + in_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        write_v = tl.load(u_v + in_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        size = tl.load(beta + row * NS + j).to(tl.float32)
        step = weight * size
        along_k = alongs_k[j]
        along_v = alongs_v[j]
        sk -= step[:, None] * (write_k - key * along_k[:, None])
        sv -= step[:, None] * (write_v - key * along_v[:, None])
        grad_k = tl.sum(gk * key, 1)
        grad_v = tl.sum(gv * key, 1)
        d_step = tl.sum(gk * write_k + gv * write_v, 1) - along_k * grad_k - along_v * grad_v
        d_weight += size * d_step
        tl.store(d_beta + row * NS + j, tl.sum(weight * d_step, 0))
        tl.store(d_u_k + in_row, tl.sum(step[:, None] * gk, 0).to(d_u_k.dtype.element_ty), mask=d < D)
        tl.store(d_u_v + in_row, tl.sum(step[:, None] * gv, 0).to(d_u_v.dtype.element_ty), mask=d < D)
        pulls = (step * grad_k)[:, None] * sk + (step * along_k)[:, None] * gk
        pulls += (step * grad_v)[:, None] * sv + (step * along_v)[:, None] * gv
        tl.store(d_k + in_row, (-tl.sum(pulls, 0)).to(d_k.dtype.element_ty), mask=d < D)
        gk -= (step * grad_k)[:, None] * key
        gv -= (step * grad_v)[:, None] * key

    d_decay = tl.sum(before_k * gk + before_v * gv, 1) + z * gz
    follows = weight <= 0.999  # above it the decay no longer depends on w
    d_weight -= tl.where(follows, d_decay * power * decay / (1.0 - tl.minimum(weight, 0.999)), 0.0)
    tl.store(d_gamma + s * L + t, tl.sum(d_decay * decay * log_keep, 0))
    if SURPRISE:
        stored = in_k_slots & (pointer >= 0)
        score = tl.load(surprise_after + s * L * K + tl.maximum(pointer, 0), mask=stored, other=0.0)
        if ENTERING:
            enters = in_k_slots & (pointer <= -2)
            memory = s * R_in + tl.maximum(-2 - pointer, 0)
            score += tl.load(in_surprise + memory, mask=enters, other=0.0)
        error_k = tl.load(errors + event * 2, mask=in_k_slots, other=0.0)
        error_v = tl.load(errors + event * 2 + 1, mask=in_k_slots, other=0.0)
        gs = tl.load(adjoint_surprise + event, mask=in_k_slots, other=0.0)
        mix = tl.load(a_s + h).to(tl.float32)
        forget = 1.0 - tl.load(eta + h).to(tl.float32)
        d_rate = gs * (mix * error_k + (1.0 - mix) * error_v - score)
        d_weight += forget * d_rate
        tl.store(d_a_s + s * L + t, tl.sum(gs * forget * weight * (error_k - error_v), 0))
        tl.store(d_eta + s * L + t, -tl.sum(d_rate * weight, 0))
    tl.store(d_w + row * K + i, d_weight, mask=in_k_slots)
