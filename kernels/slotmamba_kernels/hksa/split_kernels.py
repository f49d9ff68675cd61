"""Triton kernels that split long chains into blocks, so that a hot slot does not hold up all others.

A write is affine in the state: S -> a (I - x_n k_n k_n^T) ... (I - x_1 k_1 k_1^T) S + const, with x_j = w beta_j. So
is a block of writes, of R steps in all, and its linear part has the compact form of chunked delta rules (Yang et al.,
2024, "Parallelizing linear transformers with the delta rule over sequence length"), in which the decays are a factor:

    P = A (I - K^T diag(x) T K),   A the product of the decays,   T^-1 = I + L,   L_im = (k_i . k_m) x_m for m < i.

All blocks are walked from an empty state side by side, which gives their constants Q (`chain_forward` as a probe).
`carry_blocks` goes from block to block of a chain, S <- P S + Q, or backwards with P^T on adjoints, and leaves the
state with which each block begins; then all blocks are walked again, from there. Conventions as in forward_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEPS = tl.constexpr(32)  # R, of a block


@triton.jit
def choose_blocks(
    bucket, block_begin, long_buckets, buckets, capacity, most, least,
    BUCKETS: tl.constexpr, WRITES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Which buckets of a stream are split: those of more than `least` writes, doubled until all blocks fit.

    block_begin [S, NB+1]: number of a bucket's first block among at most `capacity` of the stream, of WRITES writes
    each; none if it is that of the next bucket. long_buckets [S, most+1]: the buckets that are split, last their
    number.
    """
    s = tl.program_id(0)
    i = tl.arange(0, BUCKETS)
    at = bucket + s * (buckets + 1) + i
    count = tl.load(at + 1, mask=i < buckets, other=0) - tl.load(at, mask=i < buckets, other=0)
    blocks = (count + WRITES - 1) // WRITES
    for _ in range(LEVELS):
        fits = tl.sum(tl.where(count > least, blocks, 0), 0) <= capacity
        least = tl.where(fits, least, 2 * least)
    long = (count > least).to(tl.int32)
    blocks *= long
    tl.store(block_begin + s * (buckets + 1) + i, tl.cumsum(blocks, 0) - blocks, mask=i < buckets)
    tl.store(block_begin + s * (buckets + 1) + buckets, tl.sum(blocks, 0))
    tl.store(long_buckets + s * (most + 1) + tl.cumsum(long, 0) - 1, i, mask=long > 0)
    tl.store(long_buckets + s * (most + 1) + most, tl.sum(long, 0))


@triton.jit
def load_keys(
    k, beta, w, order, first, last, d,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of the steps of writes [first, last): k [R, BD] in its dtype and x [R], zeros where there are fewer."""
    r = tl.arange(0, STEPS)
    live = first + r // NS < last
    event = tl.load(order + first + r // NS, mask=live, other=0)
    token = event // K
    weight = tl.load(w + token * (H * K) + event % K, mask=live, other=0.0).to(tl.float32)
    size = tl.load(beta + token * (H * NS) + r % NS, mask=live, other=0.0).to(tl.float32)
    at = k + (token * (H * NS * D) + r % NS * D)[:, None] + d[None, :]
    return tl.load(at, mask=live[:, None] & (d[None, :] < D), other=0.0), weight * size


@triton.jit
def map_blocks(
    k, beta, w, log_keep, gamma, order, previous, bucket, block_begin, block_range, triangles, decays,
    start, T, L, buckets, capacity,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    WRITES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of each block its writes, block_range [S, capacity, 2], T, triangles [S, capacity, R, R], and A, decays
    [S, capacity], which is 0 where a write of the block starts anew."""
    block = tl.program_id(0)
    s = tl.program_id(1).to(tl.int64)
    b = s // H
    h = s % H
    begins = block_begin + s * (buckets + 1)
    if block < tl.load(begins + buckets):
        low = 0  # the last bucket that begins at this block or before it
        high = buckets - 1
        for _ in range(BITS):
            middle = (low + high + 1) // 2
            before = tl.load(begins + middle) <= block
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        bucket += s * (buckets + 1) + low
        first = tl.load(bucket) + (block - tl.load(begins + low)) * WRITES
        last = tl.minimum(first + WRITES, tl.load(bucket + 1))
        at_block = s * capacity + block
        tl.store(block_range + at_block * 2, first)
        tl.store(block_range + at_block * 2 + 1, last)

        row0 = (b * T + start) * H + h
        order += s * L * K
        d = tl.arange(0, BD)
        r = tl.arange(0, STEPS)
        keys, x = load_keys(k + row0 * (NS * D), beta + row0 * NS, w + row0 * K, order, first, last, d, H, NS, K, D, BD)
        keys = keys.to(tl.float32)
        products = tl.dot(keys, tl.trans(keys), input_precision="ieee") * x[None, :]
        products = tl.where(r[:, None] > r[None, :], products, 0.0)
        inverse = (r[:, None] == r[None, :]).to(tl.float32)
        for i in range(1, STEPS):  # forward substitution, row by row
            row = tl.sum(tl.where(r[:, None] == i, products, 0.0), 0)
            solved = tl.sum(row[:, None] * inverse, 0)
            inverse -= tl.where(r[:, None] == i, solved[None, :], 0.0)
        tl.store(triangles + at_block * (STEPS * STEPS) + r[:, None] * STEPS + r[None, :], inverse)

        write = first + r
        live = write < last
        event = tl.load(order + write, mask=live, other=0)
        kept = tl.load(
            log_keep + (b * L * H + h) * K + event // K * (H * K) + event % K, mask=live, other=0.0
        )  # fmt: skip
        source = tl.load(previous + s * L * K + write, mask=live, other=0)
        decay = tl.exp(tl.load(gamma + h).to(tl.float32) * tl.sum(kept, 0))
        tl.store(decays + at_block, tl.where(tl.min(source, 0) >= 0, decay, 0.0))


@triton.jit
def load_map(
    k, beta, w, order, block_range, triangles, decays, constants, constants_z, at_block, memory, live, d,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """P and Q of a block: k [R, BD], x [R], T [R, R], A, Q [BD] of the memory and of the normaliser."""
    r = tl.arange(0, STEPS)
    first = tl.load(block_range + at_block * 2, mask=live, other=0)
    last = tl.load(block_range + at_block * 2 + 1, mask=live, other=0)
    keys, x = load_keys(k, beta, w, order, first, last, d, H, NS, K, D, BD)
    triangle = triangles + at_block * (STEPS * STEPS) + r[:, None] * STEPS + r[None, :]
    return (
        keys,
        x,
        tl.load(triangle, mask=live, other=0.0),
        tl.load(decays + at_block, mask=live, other=0.0),
        tl.load(constants + (at_block * 2 + memory) * D + d, mask=live & (d < D), other=0.0),
        tl.load(constants_z + at_block, mask=live, other=0.0),
    )


@triton.jit
def carry_blocks(
    k, beta, w, order, block_begin, long_buckets, block_range, triangles, decays, constants, constants_z,
    carried, carried_z,
    start, T, L, buckets, capacity, most,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Goes along the blocks of a long bucket, for key or for value memory. carried [S, capacity, 2, D], carried_z
    [S, capacity]: the state that a block begins from, or BACKWARD the adjoint that comes to its end from those after
    it; from `constants` of the same shapes, with which each block ends when it begins from zeros."""
    s = tl.program_id(1).to(tl.int64)
    memory = tl.program_id(2)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    row0 = (b * T + start) * H + h
    k += row0 * (NS * D)
    beta += row0 * NS
    w += row0 * K
    order += s * L * K
    long_buckets += s * (most + 1)
    listed = tl.program_id(0) < tl.load(long_buckets + most)
    begins = block_begin + s * (buckets + 1) + tl.load(long_buckets + tl.program_id(0), mask=listed, other=0)
    first = tl.load(begins, mask=listed, other=0)
    last = tl.load(begins + 1, mask=listed, other=0)

    state = tl.zeros([BD], tl.float32)
    z = 0.0
    begin = s * capacity + (last - 1 if BACKWARD else first)
    ahead = load_map(
        k, beta, w, order, block_range, triangles, decays, constants, constants_z, begin, memory, first < last, d,
        H, NS, K, D, BD,
    )  # fmt: skip
    for i in range(last - first):
        at_block = begin + (-i if BACKWARD else i)
        of_block = ahead
        ahead = load_map(
            k, beta, w, order, block_range, triangles, decays, constants, constants_z,
            at_block + (-1 if BACKWARD else 1), memory, i + 1 < last - first, d, H, NS, K, D, BD,
        )  # fmt: skip
        tl.store(carried + (at_block * 2 + memory) * D + d, state, mask=d < D)
        if memory == 0:
            tl.store(carried_z + at_block, z)
        keys = of_block[0].to(tl.float32)
        along = tl.sum(keys * state[None, :], 1)
        if BACKWARD:
            pulled = tl.sum(of_block[2] * (of_block[1] * along)[:, None], 0)
        else:
            pulled = of_block[1] * tl.sum(of_block[2] * along[None, :], 1)
        state = of_block[3] * (state - tl.sum(keys * pulled[:, None], 0)) + of_block[4]
        z = of_block[3] * z + of_block[5]


@triton.jit
def range_of_program(
    bucket, block_begin, block_range, s, buckets, capacity, SPLIT: tl.constexpr, PROBE: tl.constexpr
):  # fmt: skip
    """First and last writes of a program of chain_forward or chain_backward, and its block or -1.

    Programs 0 to buckets - 1 take the buckets that are not split, the others a block each. As a PROBE there are only
    these.
    """
    number = tl.program_id(0)
    if SPLIT:
        begins = block_begin + s * (buckets + 1)
        block = number if PROBE else number - buckets
        in_block = (block >= 0) & (block < tl.load(begins + buckets))
        place = tl.where(block >= 0, 0, number)
        whole = (block < 0) & (tl.load(begins + place) == tl.load(begins + place + 1))
        at = bucket + s * (buckets + 1) + place
        at_block = block_range + (s * capacity + block) * 2
        first = tl.load(at, mask=whole, other=0) + tl.load(at_block, mask=in_block, other=0)
        last = tl.load(at + 1, mask=whole, other=0) + tl.load(at_block + 1, mask=in_block, other=0)
    else:
        at = bucket + s * (buckets + 1) + number
        first = tl.load(at)
        last = tl.load(at + 1)
        block = -1
    return first, last, block
