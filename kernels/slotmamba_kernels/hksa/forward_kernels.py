"""Triton kernels of HKSA's forward pass (hksa.md sections 2, 3 and 7).

Streams s = b*H + h; events of a stream are numbered t*K + j within the stretch of L tokens that a launch works on,
which starts at token `start` of tensors of T tokens. `event_plan.py` says what the arrays of the plan hold.

Slots never mix, so the writes are walked chain by chain, many chains at once: a program takes C buckets of slots and
walks their writes in time order, its states in registers. After each write it stores what the slot then holds,
C = S / z, for the reads, which are a second kernel, parallel over tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_DECAY_WEIGHT = tl.constexpr(0.999)  # as in reference.py: keeps the gradient of log1p(-w) finite
MIN_READ_WEIGHT = tl.constexpr(1e-30)
MIN_BETA_SUM = tl.constexpr(1e-30)


@triton.jit
def log1p_minus(w):
    """log(1 - min(w, 0.999)), to the last digits for small w too."""
    x = -tl.minimum(w, MAX_DECAY_WEIGHT)
    shifted = 1.0 + x
    return tl.where(shifted == 1.0, x, tl.log(shifted) * (x / tl.where(shifted == 1.0, 1.0, shifted - 1.0)))


@triton.jit
def load_steps(x, row, j: tl.constexpr, d, mask, NS: tl.constexpr, D: tl.constexpr):
    """Vectors of Householder step j of token rows `row`: [C, BD] in x's dtype."""
    return tl.load(x + ((row * NS + j) * D)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_writes(k, u_k, u_v, row, d, mask, NS: tl.constexpr, D: tl.constexpr):
    """All the vectors that the writes of token rows `row` need, a flat tuple k_0, u_k0, u_v0, k_1, ..."""
    vectors = ()
    for j in tl.static_range(NS):
        vectors = vectors + (
            load_steps(k, row, j, d, mask, NS, D),
            load_steps(u_k, row, j, d, mask, NS, D),
            load_steps(u_v, row, j, d, mask, NS, D),
        )
    return vectors


@triton.jit
def chain_forward(
    k, u_k, u_v, beta, w, gamma,
    order, previous, leaving, bucket,
    in_k, in_v, in_z, in_surprise,
    c_k, c_v, lam_k, lam_v, a_s, eta,
    contents, z_after, surprise_after, errors,
    out_k, out_v, out_z, out_surprise,
    start, T, L, R_in, R_out, buckets, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    ENTERING: tl.constexpr, LEAVING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr,
):  # fmt: skip
    """Walks the writes of C buckets. contents [S, L*K, 2, D], z_after, surprise_after [S, L*K], errors [S, L*K, 2]."""
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    in_d = d[None, :] < D
    nb = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.load(bucket + s * (buckets + 1) + nb, mask=nb < buckets, other=0)
    last = tl.load(bucket + s * (buckets + 1) + nb + 1, mask=nb < buckets, other=0)
    power = tl.load(gamma + h).to(tl.float32)
    sk = tl.zeros([C, BD], tl.float32)
    sv = tl.zeros([C, BD], tl.float32)
    z = tl.zeros([C], tl.float32) + empty_z
    surprise = tl.zeros([C], tl.float32)

    writes = s * L * K
    token0 = b * T + start
    live = first < last
    event = tl.load(order + writes + first, mask=live, other=0)
    row = (token0 + event // K) * H + h
    vectors = load_writes(k, u_k, u_v, row, d, live[:, None] & in_d, NS, D)
    longest = tl.max(last - first, 0)
    for i in range(longest):
        p = first + i
        live = p < last
        # The next write's vectors do not depend on the state: they arrive while this one is computed.
        next_live = p + 1 < last
        next_event = tl.load(order + writes + p + 1, mask=next_live, other=0)
        next_row = (token0 + next_event // K) * H + h
        current = vectors
        vectors = load_writes(k, u_k, u_v, next_row, d, next_live[:, None] & in_d, NS, D)

        source = tl.load(previous + writes + p, mask=live, other=-1)
        weight = tl.load(w + row * K + event % K, mask=live, other=0.0).to(tl.float32)
        fresh = source < 0
        sk = tl.where(fresh[:, None], 0.0, sk)
        sv = tl.where(fresh[:, None], 0.0, sv)
        z = tl.where(fresh, empty_z, z)
        if SURPRISE:
            surprise = tl.where(fresh, 0.0, surprise)
        if ENTERING:
            enters = live & (source <= -2)
            if tl.max(enters.to(tl.int32), 0) > 0:
                memory = s * R_in + (-2 - source)
                mask = enters[:, None] & in_d
                sk += tl.load(in_k + (memory * D)[:, None] + d[None, :], mask=mask, other=0.0)
                sv += tl.load(in_v + (memory * D)[:, None] + d[None, :], mask=mask, other=0.0)
                z = tl.where(enters, tl.load(in_z + memory, mask=enters, other=1.0), z)
                if SURPRISE:
                    surprise = tl.where(enters, tl.load(in_surprise + memory, mask=enters, other=0.0), surprise)

        if SURPRISE:
            total = tl.zeros([C], tl.float32)
            mean_k = tl.zeros([C, BD], tl.float32)
            mean_v = tl.zeros([C, BD], tl.float32)
            for j in tl.static_range(NS):
                size = tl.load(beta + row * NS + j, mask=live, other=0.0).to(tl.float32)
                total += size
                mean_k += size[:, None] * current[3 * j + 1].to(tl.float32)
                mean_v += size[:, None] * current[3 * j + 2].to(tl.float32)
            share = 1.0 / tl.maximum(total, MIN_BETA_SUM)
            miss_k = sk / z[:, None] - mean_k * share[:, None]
            miss_v = sv / z[:, None] - mean_v * share[:, None]
            error_k = tl.sum(miss_k * miss_k, 1) / D
            error_v = tl.sum(miss_v * miss_v, 1) / D
            mix = tl.load(a_s + h).to(tl.float32)
            rate = (1.0 - tl.load(eta + h).to(tl.float32)) * weight
            surprise += rate * (mix * error_k + (1.0 - mix) * error_v - surprise)
            tl.store(errors + (writes + event) * 2, error_k, mask=live)
            tl.store(errors + (writes + event) * 2 + 1, error_v, mask=live)
            tl.store(surprise_after + writes + event, surprise, mask=live)

        decay = tl.exp(power * log1p_minus(weight))
        sk *= decay[:, None]
        sv *= decay[:, None]
        z = z * decay + weight
        for j in tl.static_range(NS):
            step = (weight * tl.load(beta + row * NS + j, mask=live, other=0.0).to(tl.float32))[:, None]
            key = current[3 * j].to(tl.float32)
            along_k = tl.sum(key * sk, 1)[:, None]
            along_v = tl.sum(key * sv, 1)[:, None]
            sk += step * (current[3 * j + 1].to(tl.float32) - key * along_k)
            sv += step * (current[3 * j + 2].to(tl.float32) - key * along_v)
        if INJECT:
            at = row * K + event % K
            mask = live[:, None] & in_d
            share_k = tl.where(weight > 0.0, tl.load(lam_k + at, mask=live, other=0.0).to(tl.float32), 0.0)
            share_v = tl.where(weight > 0.0, tl.load(lam_v + at, mask=live, other=0.0).to(tl.float32), 0.0)
            injected_k = tl.load(c_k + (at * D)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            injected_v = tl.load(c_v + (at * D)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
            sk = sk * (1.0 - share_k)[:, None] + (share_k * z)[:, None] * injected_k
            sv = sv * (1.0 - share_v)[:, None] + (share_v * z)[:, None] * injected_v

        inverse = (1.0 / z)[:, None]
        at = contents + ((writes + event) * (2 * D))[:, None] + d[None, :]
        tl.store(at, (sk * inverse).to(contents.dtype.element_ty), mask=live[:, None] & in_d)
        tl.store(at + D, (sv * inverse).to(contents.dtype.element_ty), mask=live[:, None] & in_d)
        tl.store(z_after + writes + event, z, mask=live)
        if LEAVING:
            left = tl.load(leaving + writes + p, mask=live, other=-1)
            leaves = left >= 0
            if tl.max(leaves.to(tl.int32), 0) > 0:
                memory = s * R_out + left
                mask = leaves[:, None] & in_d
                tl.store(out_k + (memory * D)[:, None] + d[None, :], sk, mask=mask)
                tl.store(out_v + (memory * D)[:, None] + d[None, :], sv, mask=mask)
                tl.store(out_z + memory, z, mask=leaves)
                if SURPRISE:
                    tl.store(out_surprise + memory, surprise, mask=leaves)
        event = next_event
        row = next_row


@triton.jit
def load_contents(
    contents, z_after, in_k, in_v, in_z, source, s, events, R_in, empty_z, d, live,
    D: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    """What the states that `source` [N] points at hold: C_k, C_v [N, BD] and z [N], float32 (empty: 0, 0, empty_z)."""
    in_d = d[None, :] < D
    stored = live & (source >= 0)
    at = (s * events + tl.maximum(source, 0)) * (2 * D)
    mask = stored[:, None] & in_d
    held_k = tl.load(contents + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    held_v = tl.load(contents + (at + D)[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_after + s * events + tl.maximum(source, 0), mask=stored, other=1.0)
    z = tl.where(stored, z, empty_z)
    if ENTERING:
        enters = live & (source <= -2)
        if tl.max(enters.to(tl.int32), 0) > 0:
            memory = s * R_in + tl.maximum(-2 - source, 0)
            z = tl.where(enters, tl.load(in_z + memory, mask=enters, other=1.0), z)
            mask = enters[:, None] & in_d
            held_k += tl.load(in_k + (memory * D)[:, None] + d[None, :], mask=mask, other=0.0) / z[:, None]
            held_v += tl.load(in_v + (memory * D)[:, None] + d[None, :], mask=mask, other=0.0) / z[:, None]
    return held_k, held_v, z


@triton.jit
def read_forward(
    q, w, source, contents, z_after, in_k, in_v, in_z, o,
    start, T, L, events, R_in, empty_z, scale,
    H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    """One token of one stream: softmax attention over the K states that its reads see."""
    t = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    row = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    i = tl.arange(0, BK)
    pointer = tl.load(source + ((b * L + t) * H + h) * K + i, mask=i < K, other=-1)
    held_k, held_v, _ = load_contents(
        contents, z_after, in_k, in_v, in_z, pointer, s, events, R_in, empty_z, d, i < K, D, ENTERING
    )
    query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(w + row * K + i, mask=i < K, other=1.0).to(tl.float32)
    score = tl.sum(held_k * query[None, :], 1) * scale + tl.log(tl.maximum(weight, MIN_READ_WEIGHT))
    score = tl.where(i < K, score, float("-inf"))
    p = tl.exp(score - tl.max(score, 0))
    out = tl.sum(held_v * (p / tl.sum(p, 0))[:, None], 0)
    tl.store(o + row * D + d, out.to(o.dtype.element_ty), mask=d < D)
