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
def load_vectors(x, offset, d, live, D: tl.constexpr, BD: tl.constexpr):
    """x[offset + d] for the rows that are live: [C, BD] in x's dtype."""
    at = x + offset[:, None] + d[None, :]
    # d is a power of two as a rule, and then needs no mask of its own.
    return tl.load(at, mask=live[:, None] if D == BD else live[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def store_vectors(x, offset, d, live, value, D: tl.constexpr, BD: tl.constexpr):
    at = x + offset[:, None] + d[None, :]
    mask = live[:, None] if D == BD else live[:, None] & (d[None, :] < D)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def take(values, first: tl.constexpr, count: tl.constexpr):
    """values[first : first + count] of a tuple."""
    taken = ()
    for x in tl.static_range(count):
        taken = taken + (values[first + x],)
    return taken


@triton.jit
def load_write(
    k, u_k, u_v, beta, w, event, d, live,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What a write needs beside the state, a flat tuple: its weight, then beta_j, k_j, u_kj, u_vj of each step."""
    token = event // K
    write = (tl.load(w + token * (H * K) + event % K, mask=live, other=0.0).to(tl.float32),)
    for j in tl.static_range(NS):
        offset = token * (H * NS * D) + j * D
        write = write + (
            tl.load(beta + token * (H * NS) + j, mask=live, other=0.0).to(tl.float32),
            load_vectors(k, offset, d, live, D, BD),
            load_vectors(u_k, offset, d, live, D, BD),
            load_vectors(u_v, offset, d, live, D, BD),
        )
    return write


@triton.jit
def chain_forward(
    k, u_k, u_v, beta, w, gamma,
    order, previous, leaving, bucket,
    in_k, in_v, in_z, in_surprise,
    c_k, c_v, lam_k, lam_v, a_s, eta,
    contents, z_after, alongs, surprise_after, errors,
    out_k, out_v, out_z, out_surprise,
    start, T, L, R_in, R_out, buckets, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    ENTERING: tl.constexpr, LEAVING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Walks the writes of C buckets. contents [S, L*K, 2, D]; z_after, surprise_after [S, L*K]; errors [S, L*K, 2];
    alongs [S, L*K, n, 2]: what each step found along its direction, k_j . S, of key and value memory.

    DEPTH: so many writes ahead their vectors, which do not depend on the state, are loaded. It pays where there are too
    few chains for one to run while another waits.
    """
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    nb = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.load(bucket + s * (buckets + 1) + nb, mask=nb < buckets, other=0)
    last = tl.load(bucket + s * (buckets + 1) + nb + 1, mask=nb < buckets, other=0)
    power = tl.load(gamma + h).to(tl.float32)
    sk = tl.zeros([C, BD], tl.float32)
    sv = tl.zeros([C, BD], tl.float32)
    z = tl.zeros([C], tl.float32) + empty_z
    surprise = tl.zeros([C], tl.float32)

    # Within a stream and a stretch offsets fit 32 bits.
    row0 = (b * T + start) * H + h
    k += row0 * (NS * D)
    u_k += row0 * (NS * D)
    u_v += row0 * (NS * D)
    beta += row0 * NS
    w += row0 * K
    writes = s * L * K
    order += writes
    previous += writes
    contents += writes * (2 * D)
    z_after += writes
    alongs += writes * (2 * NS)

    event = tl.load(order + first, mask=first < last, other=0)
    source = tl.load(previous + first, mask=first < last, other=-1)
    ahead = ()
    for x in tl.static_range(DEPTH):
        early = tl.load(order + first + x, mask=first + x < last, other=0)
        ahead = ahead + load_write(k, u_k, u_v, beta, w, early, d, first + x < last, H, NS, K, D, BD)
    longest = tl.max(last - first, 0)
    for i in range(longest):
        p = first + i
        live = p < last
        next_live = p + 1 < last
        next_event = tl.load(order + p + 1, mask=next_live, other=0)
        next_source = tl.load(previous + p + 1, mask=next_live, other=-1)
        if DEPTH > 0:
            write = take(ahead, 0, 1 + 4 * NS)
            early = tl.load(order + p + DEPTH, mask=p + DEPTH < last, other=0)
            new = load_write(k, u_k, u_v, beta, w, early, d, p + DEPTH < last, H, NS, K, D, BD)
            ahead = take(ahead, 1 + 4 * NS, (DEPTH - 1) * (1 + 4 * NS)) + new
        else:
            write = load_write(k, u_k, u_v, beta, w, event, d, live, H, NS, K, D, BD)
        weight = write[0]

        started = source >= 0  # whether the state goes on; else it starts anew, from the entering memory or empty
        if ENTERING:
            enters = live & (source <= -2)
            if tl.max(enters.to(tl.int32), 0) > 0:
                memory = s * R_in + (-2 - source)
                sk = tl.where(enters[:, None], load_vectors(in_k, memory * D, d, enters, D, BD), sk)
                sv = tl.where(enters[:, None], load_vectors(in_v, memory * D, d, enters, D, BD), sv)
                z = tl.where(enters, tl.load(in_z + memory, mask=enters, other=1.0), z)
                if SURPRISE:
                    surprise = tl.where(enters, tl.load(in_surprise + memory, mask=enters, other=0.0), surprise)
            started = started | enters
        z = tl.where(started, z, empty_z)
        if SURPRISE:
            surprise = tl.where(started, surprise, 0.0)
            sk = tl.where(started[:, None], sk, 0.0)
            sv = tl.where(started[:, None], sv, 0.0)

        if SURPRISE:
            total = tl.zeros([C], tl.float32)
            mean_k = tl.zeros([C, BD], tl.float32)
            mean_v = tl.zeros([C, BD], tl.float32)
            for j in tl.static_range(NS):
                size = write[4 * j + 1]
                total += size
                mean_k += size[:, None] * write[4 * j + 3].to(tl.float32)
                mean_v += size[:, None] * write[4 * j + 4].to(tl.float32)
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
        z = z * decay + weight
        decay = tl.where(started, decay, 0.0)
        sk *= decay[:, None]
        sv *= decay[:, None]
        for j in tl.static_range(NS):
            step = (weight * write[4 * j + 1])[:, None]
            key = write[4 * j + 2].to(tl.float32)
            along_k = tl.sum(key * sk, 1)
            along_v = tl.sum(key * sv, 1)
            sk += step * write[4 * j + 3].to(tl.float32)
            sv += step * write[4 * j + 4].to(tl.float32)
            sk -= key * (step * along_k[:, None])
            sv -= key * (step * along_v[:, None])
            tl.store(alongs + (event * NS + j) * 2, along_k, mask=live)
            tl.store(alongs + (event * NS + j) * 2 + 1, along_v, mask=live)
        if INJECT:
            at = (row0 + event // K * H) * K + event % K
            share_k = tl.where(weight > 0.0, tl.load(lam_k + at, mask=live, other=0.0).to(tl.float32), 0.0)
            share_v = tl.where(weight > 0.0, tl.load(lam_v + at, mask=live, other=0.0).to(tl.float32), 0.0)
            injected_k = load_vectors(c_k, at * D, d, live, D, BD).to(tl.float32)
            injected_v = load_vectors(c_v, at * D, d, live, D, BD).to(tl.float32)
            sk = sk * (1.0 - share_k)[:, None] + (share_k * z)[:, None] * injected_k
            sv = sv * (1.0 - share_v)[:, None] + (share_v * z)[:, None] * injected_v

        inverse = (1.0 / z)[:, None]
        store_vectors(contents, event * (2 * D), d, live, sk * inverse, D, BD)
        store_vectors(contents, event * (2 * D) + D, d, live, sv * inverse, D, BD)
        tl.store(z_after + event, z, mask=live)
        if LEAVING:
            left = tl.load(leaving + writes + p, mask=live, other=-1)
            leaves = left >= 0
            if tl.max(leaves.to(tl.int32), 0) > 0:
                memory = s * R_out + left
                store_vectors(out_k, memory * D, d, leaves, sk, D, BD)
                store_vectors(out_v, memory * D, d, leaves, sv, D, BD)
                tl.store(out_z + memory, z, mask=leaves)
                if SURPRISE:
                    tl.store(out_surprise + memory, surprise, mask=leaves)
        event = next_event
        source = next_source


@triton.jit
def load_contents(
    contents, z_after, in_k, in_v, in_z, source, s, events, R_in, empty_z, d, live,
    D: tl.constexpr, BD: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    """What the states that `source` [N] points at hold: C_k, C_v [N, BD] and z [N], float32 (empty: 0, 0, empty_z)."""
    stored = live & (source >= 0)
    write = tl.maximum(source, 0)
    contents += s * events * (2 * D)
    held_k = load_vectors(contents, write * (2 * D), d, stored, D, BD).to(tl.float32)
    held_v = load_vectors(contents, write * (2 * D) + D, d, stored, D, BD).to(tl.float32)
    z = tl.where(stored, tl.load(z_after + s * events + write, mask=stored, other=1.0), empty_z)
    if ENTERING:
        enters = live & (source <= -2)
        if tl.max(enters.to(tl.int32), 0) > 0:
            memory = s * R_in + tl.maximum(-2 - source, 0)
            z = tl.where(enters, tl.load(in_z + memory, mask=enters, other=1.0), z)
            held_k += load_vectors(in_k, memory * D, d, enters, D, BD) / z[:, None]
            held_v += load_vectors(in_v, memory * D, d, enters, D, BD) / z[:, None]
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
        contents, z_after, in_k, in_v, in_z, pointer, s, events, R_in, empty_z, d, i < K, D, BD, ENTERING
    )
    query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(w + row * K + i, mask=i < K, other=1.0).to(tl.float32)
    score = tl.sum(held_k * query[None, :], 1) * scale + tl.log(tl.maximum(weight, MIN_READ_WEIGHT))
    score = tl.where(i < K, score, float("-inf"))
    p = tl.exp(score - tl.max(score, 0))
    out = tl.sum(held_v * (p / tl.sum(p, 0))[:, None], 0)
    tl.store(o + row * D + d, out.to(o.dtype.element_ty), mask=d < D)
