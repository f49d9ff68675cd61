"""Triton kernel of a decoding step: addresses, write and read of one token, on the state in place."""

from __future__ import annotations

import triton
import triton.language as tl

from slotmamba_kernels.hksa.reference import MAX_DECAY_WEIGHT, MIN_BETA_SUM, MIN_READ_WEIGHT
from slotmamba_kernels.kronecker.triton_kernels import empty_beam, merge_factor

_MAX_DECAY_WEIGHT = tl.constexpr(MAX_DECAY_WEIGHT)
_MIN_BETA_SUM = tl.constexpr(MIN_BETA_SUM)
_MIN_READ_WEIGHT = tl.constexpr(MIN_READ_WEIGHT)


@triton.jit
def log1p_minus(x):  # type: ignore[no-untyped-def]
    """log(1 - x) for x in [0, 1): the logarithm plus, to first order, what rounding 1 - x took."""
    y = 1.0 - x
    return tl.log(y) + ((1.0 - y) - x) / y


@triton.jit
def column_of(tile, lane, which):  # type: ignore[no-untyped-def]
    """Column `which` of tile [N, COLUMNS]; lane [1, COLUMNS] numbers the columns."""
    return tl.sum(tl.where(lane == which, tile, 0), 1)


@triton.jit
def vector(pointers, column, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The DIM numbers at the pointers as a float32 row [1, D], zeros beyond them."""
    return tl.load(pointers + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]


@triton.jit
def addresses(  # type: ignore[no-untyped-def]
    write_logits_ptr,
    read_logits_ptr,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BEAM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Slots and weights of the write and of the read, [BEAM] each.

    Even columns of the beam find the slots of the write, odd ones those of the read. With 32 columns a warp every
    thread computes one of the two on its own: that is quicker than exchanging numbers between threads.
    """
    lane = tl.arange(0, COLUMNS)[None, :]
    entry = tl.arange(0, P)[:, None]
    sums, prefixes, normaliser = empty_beam(BEAM, COLUMNS)
    for u in range(FACTORS):
        write = tl.load(write_logits_ptr + u * SIZE + entry, mask=entry < SIZE, other=-float("inf")).to(tl.float32)
        read = tl.load(read_logits_ptr + u * SIZE + entry, mask=entry < SIZE, other=-float("inf")).to(tl.float32)
        logits = tl.where(lane % 2 == 0, write, read)
        sums, prefixes, total = merge_factor(sums, prefixes, logits, SIZE, K, P, BEAM, COLUMNS)
        normaliser *= total
    weights = tl.exp(sums) / normaliser
    return (
        column_of(prefixes, lane, 0),
        column_of(weights, lane, 0),
        column_of(prefixes, lane, 1),
        column_of(weights, lane, 1),
    )


@triton.jit
def step_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    u_k_ptr,
    u_v_ptr,
    beta_ptr,
    write_logits_ptr,
    read_logits_ptr,
    gamma_ptr,
    a_s_ptr,
    eta_ptr,
    s_k_ptr,
    s_v_ptr,
    z_ptr,
    surprise_ptr,
    o_ptr,
    heads,
    num_slots,
    scale,
    DIM: tl.constexpr,
    D: tl.constexpr,
    STEPS: tl.constexpr,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    BEAM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token of one head of one row of the batch."""
    pair = tl.program_id(0).to(tl.int64)
    head = pair % heads
    column = tl.arange(0, D)
    active = tl.arange(0, BEAM) < K
    inside = active[:, None] & (column < DIM)[None, :]
    k_ptr += pair * (STEPS * DIM)
    u_k_ptr += pair * (STEPS * DIM)
    u_v_ptr += pair * (STEPS * DIM)
    beta_ptr += pair * STEPS

    logits = pair * (FACTORS * SIZE)
    write_slot, w, read_slot, read_w = addresses(
        write_logits_ptr + logits, read_logits_ptr + logits, FACTORS, SIZE, K, P, BEAM, COLUMNS
    )

    slot = pair * num_slots + write_slot
    content = slot[:, None] * DIM + column[None, :]
    s_k = tl.load(s_k_ptr + content, mask=inside, other=0.0)
    s_v = tl.load(s_v_ptr + content, mask=inside, other=0.0)
    z = tl.load(z_ptr + slot, mask=active, other=1.0)

    if a_s_ptr is not None:
        surprise = tl.load(surprise_ptr + slot, mask=active, other=0.0)
        total = 0.0
        mean_k = tl.zeros([1, D], tl.float32)
        mean_v = tl.zeros([1, D], tl.float32)
        for j in tl.static_range(STEPS):
            beta = tl.load(beta_ptr + j).to(tl.float32)
            total += beta
            mean_k += beta * vector(u_k_ptr + j * DIM, column, DIM)
            mean_v += beta * vector(u_v_ptr + j * DIM, column, DIM)
        total = tl.maximum(total, _MIN_BETA_SUM)
        miss_k = s_k / z[:, None] - mean_k / total
        miss_v = s_v / z[:, None] - mean_v / total
        a_s = tl.load(a_s_ptr + head).to(tl.float32)
        error = (a_s * tl.sum(miss_k * miss_k, 1) + (1.0 - a_s) * tl.sum(miss_v * miss_v, 1)) / DIM
        surprise += (1.0 - tl.load(eta_ptr + head).to(tl.float32)) * w * (error - surprise)

    gamma = tl.load(gamma_ptr + head).to(tl.float32)
    decay = tl.exp(gamma * log1p_minus(tl.minimum(w, _MAX_DECAY_WEIGHT)))
    s_k = decay[:, None] * s_k
    s_v = decay[:, None] * s_v
    z = decay * z + w
    for j in tl.static_range(STEPS):
        key = vector(k_ptr + j * DIM, column, DIM)
        size = (w * tl.load(beta_ptr + j).to(tl.float32))[:, None]
        s_k += size * (vector(u_k_ptr + j * DIM, column, DIM) - key * tl.sum(s_k * key, 1)[:, None])
        s_v += size * (vector(u_v_ptr + j * DIM, column, DIM) - key * tl.sum(s_v * key, 1)[:, None])

    # Several threads may hold the same number: one stores it, when all have loaded it.
    tl.debug_barrier()
    tl.store(s_k_ptr + content, s_k, mask=inside)
    tl.store(s_v_ptr + content, s_v, mask=inside)
    tl.store(z_ptr + slot, z, mask=active)
    if a_s_ptr is not None:
        tl.store(surprise_ptr + slot, surprise, mask=active)

    # The read may address slots that other threads of this program have just written.
    tl.debug_barrier()
    slot = pair * num_slots + read_slot
    content = slot[:, None] * DIM + column[None, :]
    s_k = tl.load(s_k_ptr + content, mask=inside, other=0.0)
    s_v = tl.load(s_v_ptr + content, mask=inside, other=0.0)
    z = tl.load(z_ptr + slot, mask=active, other=1.0)
    similarity = tl.sum(s_k * vector(q_ptr + pair * DIM, column, DIM), 1) / z * scale
    score = similarity + tl.log(tl.maximum(read_w, _MIN_READ_WEIGHT))
    score = tl.where(active, score, -float("inf"))
    p = tl.exp(score - tl.max(score, 0))
    o = tl.sum((p / z)[:, None] * s_v, 0) / tl.sum(p, 0)
    tl.store(o_ptr + pair * DIM + column, o, mask=column < DIM)
