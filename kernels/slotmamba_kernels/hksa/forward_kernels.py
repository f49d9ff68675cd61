"""Triton kernels of HKSA's forward pass (hksa.md sections 2, 3 and 7).

Streams s = b*H + h; events of a stream are numbered t*K + j within the stretch of L tokens that a launch works on,
which starts at token `start` of tensors of T tokens. `event_plan.py` says what the arrays of the plan hold.

Slots never mix, so the writes are walked chain by chain, a warp each: it walks the writes of a bucket of slots in time
order, key and value memory as the two rows of one tile in registers. After each write it stores what the slot then
holds, C = S / z, for the reads, which are a second kernel, parallel over tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.split_kernels import range_of_program

MAX_DECAY_WEIGHT = tl.constexpr(0.999)  # as in reference.py: keeps the gradient of log1p(-w) finite
MIN_READ_WEIGHT = tl.constexpr(1e-30)
MIN_BETA_SUM = tl.constexpr(1e-30)
NORMAL = tl.constexpr("")  # eviction policy


@triton.jit
def log1p_minus(w):
    """log(1 - min(w, 0.999)), to the last digits for small w too."""
    x = -tl.minimum(w, MAX_DECAY_WEIGHT)
    shifted = 1.0 + x
    return tl.where(shifted == 1.0, x, tl.log(shifted) * (x / tl.where(shifted == 1.0, 1.0, shifted - 1.0)))


@triton.jit
def write_log_keeps(w, log_keep, start, T, L, width, BLOCK: tl.constexpr):
    """log_keep [B, L, H*K] = log(1 - w) of a stretch of w [B, T, H*K], width = H*K; a row of programs a sequence."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < L * width
    weight = tl.load(w + (b * T + start) * width + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(log_keep + b * L * width + i, log1p_minus(weight), mask=inside)


@triton.jit
def load_vectors(x, offset, d, live, D: tl.constexpr, BD: tl.constexpr):
    """x[offset + d] for the rows that are live: [C, BD] in x's dtype."""
    at = x + offset[:, None] + d[None, :]
    # d is a power of two as a rule, and then needs no mask of its own.
    return tl.load(at, mask=live[:, None] if D == BD else live[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def take(values, first: tl.constexpr, count: tl.constexpr):
    """values[first : first + count] of a tuple."""
    taken = ()
    for x in tl.static_range(count):
        taken = taken + (values[first + x],)
    return taken


@triton.jit
def pair(of_keys, of_values, row, d):
    """Pointers [2, BD] to a vector of key memory and one of value memory."""
    return tl.where(row == 0, of_keys, of_values)[:, None] + d[None, :]


@triton.jit
def load_pair(of_keys, of_values, row, d, live, D: tl.constexpr, BD: tl.constexpr):
    at = pair(of_keys, of_values, row, d)
    return tl.load(at, mask=live if D == BD else live & (d[None, :] < D), other=0.0)


@triton.jit
def store_pair(of_keys, of_values, row, d, value, D: tl.constexpr, BD: tl.constexpr, policy: tl.constexpr = NORMAL):
    at = pair(of_keys, of_values, row, d)
    if D == BD:
        tl.store(at, value.to(of_keys.dtype.element_ty), eviction_policy=policy)
    else:
        tl.store(at, value.to(of_keys.dtype.element_ty), mask=d[None, :] < D, eviction_policy=policy)


@triton.jit
def load_write(
    k, u_k, u_v, beta, w, log_keep, event, row, d, live,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What a write needs beside the state, a flat tuple: its weight and log(1 - weight), then of each step beta_j and
    [2, BD] k_j (twice) and u_kj, u_vj."""
    token = event // K
    at = token * (H * K) + event % K
    write = (tl.load(w + at, mask=live, other=0.0).to(tl.float32), tl.load(log_keep + at, mask=live, other=0.0))
    for j in tl.static_range(NS):
        offset = token * (H * NS * D) + j * D
        write = write + (
            tl.load(beta + token * (H * NS) + j, mask=live, other=0.0).to(tl.float32),
            load_pair(k + offset, k + offset, row, d, live, D, BD),
            load_pair(u_k + offset, u_v + offset, row, d, live, D, BD),
        )
    return write


@triton.jit
def prediction_error(state, z, write, NS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Mean squared miss [2] of what the slot holds, S / z, by the mean of what is to be written."""
    total = 0.0
    mean = tl.zeros([2, BD], tl.float32)
    for j in tl.static_range(NS):
        total += write[3 * j + 2]
        mean += write[3 * j + 2] * write[3 * j + 4].to(tl.float32)
    miss = state / z - mean / tl.maximum(total, MIN_BETA_SUM)
    return tl.sum(miss * miss, 1) / D


@triton.jit
def decay_and_write(state, z, write, power, alongs, row, NS: tl.constexpr, STORE: tl.constexpr):
    """S and z after the decay and the Householder steps of a write; with STORE alongs [n, 2] of the write are kept."""
    weight = write[0]
    decay = tl.exp(power * write[1])
    z = z * decay + weight
    state *= decay
    for j in tl.static_range(NS):
        step = weight * write[3 * j + 2]
        key = write[3 * j + 3].to(tl.float32)
        along = tl.sum(key * state, 1)
        state += step * write[3 * j + 4].to(tl.float32)
        state -= key * (step * along)[:, None]
        if STORE:
            tl.store(alongs + j * 2 + row, along)
    return state, z


@triton.jit
def store_contents(contents, z_after, event, row, d, state, z, D: tl.constexpr, BD: tl.constexpr):
    """Leaves S / z and z after a write for the reads."""
    here = contents + event * (2 * D)
    # The table does not fit the L2 cache; the vectors that other chains are about to load should stay there.
    store_pair(here, here + D, row, d, state * (1.0 / z), D, BD, "evict_first")
    tl.store(z_after + event, z)


@triton.jit
def chain_forward(
    k, u_k, u_v, beta, w, log_keep, gamma,
    order, previous, leaving, bucket, block_begin, block_range,
    in_k, in_v, in_z,
    c_k, c_v, lam_k, lam_v,
    contents, z_after, alongs, errors,
    out_k, out_v, out_z, block_states, block_z,
    start, T, L, R_in, R_out, buckets, capacity, empty_z,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ENTERING: tl.constexpr, LEAVING: tl.constexpr, SURPRISE: tl.constexpr, INJECT: tl.constexpr, DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, PROBE: tl.constexpr,
):  # fmt: skip
    """Walks the writes of a bucket, or with SPLIT of a block of a long one. contents [S, L*K, 2, D]; z_after [S, L*K];
    errors [S, L*K, 2]; alongs [S, L*K, n, 2]: what each step found along its direction, k_j . S, of key and value
    memory.

    DEPTH: so many writes ahead their vectors, which do not depend on the state, are loaded. It pays where there are too
    few chains for one to run while another waits. SPLIT: blocks begin from block_states [S, capacity, 2, D] and block_z
    [S, capacity]. PROBE: they begin from zeros, and these two and nothing else are written, S and z at their end.
    """
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    row = tl.arange(0, 2)
    first, last, block = range_of_program(bucket, block_begin, block_range, s, buckets, capacity, SPLIT, PROBE)
    power = tl.load(gamma + h).to(tl.float32)
    # Within a stream and a stretch offsets fit 32 bits.
    row0 = (b * T + start) * H + h
    k += row0 * (NS * D)
    u_k += row0 * (NS * D)
    u_v += row0 * (NS * D)
    beta += row0 * NS
    w += row0 * K
    log_keep += (b * L * H + h) * K
    writes = s * L * K
    order += writes
    previous += writes
    contents += writes * (2 * D)
    z_after += writes
    alongs += writes * (2 * NS)

    state = tl.zeros([2, BD], tl.float32)
    z = 0.0 if PROBE else empty_z + 0.0
    event = tl.load(order + first, mask=first < last, other=0)
    source = tl.load(previous + first, mask=first < last, other=-1)
    at_block = s * capacity + block
    if SPLIT and not PROBE:
        if (block >= 0) & (source >= 0):
            z = tl.load(block_z + at_block)
            begun = block_states + at_block * (2 * D)
            state = load_pair(begun, begun + D, row, d, True, D, BD)
    ahead = ()
    for x in tl.static_range(DEPTH):
        early = tl.load(order + first + x, mask=first + x < last, other=0)
        ahead = ahead + load_write(
            k, u_k, u_v, beta, w, log_keep, early, row, d, first + x < last, H, NS, K, D, BD
        )  # fmt: skip
    for p in range(first, last):
        next_event = tl.load(order + p + 1, mask=p + 1 < last, other=0)
        next_source = tl.load(previous + p + 1, mask=p + 1 < last, other=-1)
        if DEPTH > 0:
            write = take(ahead, 0, 2 + 3 * NS)
            early = tl.load(order + p + DEPTH, mask=p + DEPTH < last, other=0)
            new = load_write(k, u_k, u_v, beta, w, log_keep, early, row, d, p + DEPTH < last, H, NS, K, D, BD)
            ahead = take(ahead, 2 + 3 * NS, (DEPTH - 1) * (2 + 3 * NS)) + new
        else:
            write = load_write(k, u_k, u_v, beta, w, log_keep, event, row, d, True, H, NS, K, D, BD)
        weight = write[0]

        z = tl.where(source == -1, empty_z, z)
        state = tl.where(source == -1, 0.0, state)
        if ENTERING:
            if source <= -2:
                memory = s * R_in + (-2 - source)
                z = tl.load(in_z + memory)
                state = load_pair(in_k + memory * D, in_v + memory * D, row, d, True, D, BD)
        if SURPRISE and not PROBE:
            tl.store(errors + (writes + event) * 2 + row, prediction_error(state, z, write, NS, D, BD))

        state, z = decay_and_write(state, z, write, power, alongs + event * (NS * 2), row, NS, not PROBE)
        if INJECT:
            at = (row0 + event // K * H) * K + event % K
            share = tl.load(tl.where(row == 0, lam_k, lam_v) + at).to(tl.float32)
            share = tl.where(weight > 0.0, share, 0.0)[:, None]
            injected = load_pair(c_k + at * D, c_v + at * D, row, d, True, D, BD).to(tl.float32)
            state = state * (1.0 - share) + (share * z) * injected

        if not PROBE:
            store_contents(contents, z_after, event, row, d, state, z, D, BD)
        if LEAVING and not PROBE:
            left = tl.load(leaving + writes + p)
            if left >= 0:
                memory = s * R_out + left
                store_pair(out_k + memory * D, out_v + memory * D, row, d, state, D, BD)
                tl.store(out_z + memory, z)
        event = next_event
        source = next_source
    if PROBE:
        if first < last:
            ended = block_states + at_block * (2 * D)
            store_pair(ended, ended + D, row, d, state, D, BD)
            tl.store(block_z + at_block, z)


@triton.jit
def token_of_program(H: tl.constexpr):
    """t, h, b and s = b*H + h of a program of a grid (L*H, B): the heads of a token, whose vectors are neighbours, run
    side by side."""
    b = tl.program_id(1).to(tl.int64)
    h = tl.program_id(0) % H
    return tl.program_id(0) // H, h, b, b * H + h


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
    t, h, b, s = token_of_program(H)
    row = (b * T + start + t) * H + h
    d = tl.arange(0, BD)
    i = tl.arange(0, BK)
    pointer = tl.load(source + ((b * L + t) * H + h) * K + i, mask=i < K, other=-1)
    query = tl.load(q + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(w + row * K + i, mask=i < K, other=1.0).to(tl.float32)
    held_k, held_v, _ = load_contents(
        contents, z_after, in_k, in_v, in_z, pointer, s, events, R_in, empty_z, d, i < K, D, BD, ENTERING
    )
    score = tl.sum(held_k * query[None, :], 1) * scale + tl.log(tl.maximum(weight, MIN_READ_WEIGHT))
    score = tl.where(i < K, score, float("-inf"))
    p = tl.exp(score - tl.max(score, 0))
    out = tl.sum(held_v * (p / tl.sum(p, 0))[:, None], 0)
    tl.store(o + row * D + d, out.to(o.dtype.element_ty), mask=d < D)
