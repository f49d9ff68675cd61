"""Triton kernels that split long chains into blocks, so that a hot slot does not hold up all others.

A write is affine in the state: S -> a (I - x_n k_n k_n^T) ... (I - x_1 k_1 k_1^T) S + const, with x_j = w beta_j. So
is a block of writes, of R steps in all, and its linear part has the compact form of chunked delta rules (Yang et al.,
2024, "Parallelizing linear transformers with the delta rule over sequence length"), in which the decays are a factor:

    P = A (I - K^T W),   W = diag(x) (I + L)^-1 K,   L_im = (k_i . k_m) x_m for m < i,   A the product of the decays.

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
    """Which buckets of a stream are split: those of more than `least` writes, a number that grows until all blocks
    fit.

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
        least = tl.where(fits, least, least + least // 4 + 1)
    long = (count > least).to(tl.int32)
    blocks *= long
    tl.store(block_begin + s * (buckets + 1) + i, tl.cumsum(blocks, 0) - blocks, mask=i < buckets)
    tl.store(block_begin + s * (buckets + 1) + buckets, tl.sum(blocks, 0))
    tl.store(long_buckets + s * (most + 1) + tl.cumsum(long, 0) - 1, i, mask=long > 0)
    tl.store(long_buckets + s * (most + 1) + most, tl.sum(long, 0))


@triton.jit
def map_blocks(
    k, beta, w, log_keep, gamma, order, previous, bucket, block_begin, block_range, step_of, weighted, decays,
    start, T, L, buckets, capacity,
    H: tl.constexpr, NS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    WRITES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Of each block its writes, block_range [S, capacity, 2], and P: where its k_i are, step_of [S, capacity, R], in
    vectors from the stream's first one, -1 where it has fewer steps; W, weighted [S, capacity, R, BD]; A, decays
    [S, capacity], 0 where a write of the block starts anew."""
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
        r = tl.arange(0, STEPS)
        live = first + r // NS < last
        event = tl.load(order + first + r // NS, mask=live, other=0)
        token = event // K
        weight = tl.load(w + row0 * K + token * (H * K) + event % K, mask=live, other=0.0).to(tl.float32)
        x = weight * tl.load(beta + row0 * NS + token * (H * NS) + r % NS, mask=live, other=0.0).to(tl.float32)
        step = token * (H * NS) + r % NS
        tl.store(step_of + at_block * STEPS + r, tl.where(live, step, -1))
        offset = step * D
        k += row0 * (NS * D)

        PART: tl.constexpr = min(BD, 64)
        d = tl.arange(0, PART)
        products = tl.zeros([STEPS, STEPS], tl.float32)
        for part in range(0, BD, PART):
            inside = live[:, None] & (part + d < D)[None, :]
            keys = tl.load(k + offset[:, None] + (part + d)[None, :], mask=inside, other=0.0).to(tl.float32)
            products += tl.dot(keys, tl.trans(keys), input_precision="tf32x3")
        # L is solved row by row, each row a vector over the columns. Entries of L are wanted one at a time: they come
        # from memory, from where W will be, and rows of the inverse take the place of those of L.
        weighted += at_block * (STEPS * BD)
        products = tl.where(r[:, None] > r[None, :], products * x[None, :], 0.0)
        tl.store(weighted + r[:, None] * STEPS + r[None, :], products)
        tl.debug_barrier()
        rows = ()
        for i in tl.static_range(STEPS):
            solved = (r == i).to(tl.float32)
            for m in tl.static_range(i):
                solved -= tl.load(weighted + i * STEPS + m) * rows[m]
            rows = rows + (solved,)
        tl.debug_barrier()
        for i in tl.static_range(STEPS):
            tl.store(weighted + i * STEPS + r, rows[i])
        tl.debug_barrier()
        inverse = tl.load(weighted + r[:, None] * STEPS + r[None, :]) * x[:, None]
        tl.debug_barrier()
        for part in range(0, BD, PART):
            inside = live[:, None] & (part + d < D)[None, :]
            keys = tl.load(k + offset[:, None] + (part + d)[None, :], mask=inside, other=0.0).to(tl.float32)
            values = tl.dot(inverse, keys, input_precision="tf32x3")
            tl.store(weighted + r[:, None] * BD + (part + d)[None, :], values)

        write = first + r
        live = write < last
        event = tl.load(order + write, mask=live, other=0)
        at = (b * L * H + h) * K + event // K * (H * K) + event % K
        kept = tl.load(log_keep + at, mask=live, other=0.0)
        source = tl.load(previous + s * L * K + write, mask=live, other=0)
        decay = tl.exp(tl.load(gamma + h).to(tl.float32) * tl.sum(kept, 0))
        tl.store(decays + at_block, tl.where(tl.min(source, 0) >= 0, decay, 0.0))


@triton.jit
def load_map(
    k, step, weighted, decays, constants, constants_z, at_block, memory, live, d, D: tl.constexpr, BD: tl.constexpr
):
    """P and Q of a block: k [R, BD], W [R, BD], A, Q [BD] of the memory and of the normaliser."""
    r = tl.arange(0, STEPS)
    at = k + (step * D)[:, None] + d[None, :]
    return (
        tl.load(at, mask=(step >= 0)[:, None] & (d < D)[None, :], other=0.0),
        tl.load(weighted + at_block * (STEPS * BD) + r[:, None] * BD + d[None, :], mask=live, other=0.0),
        tl.load(decays + at_block, mask=live, other=0.0),
        tl.load(constants + (at_block * 2 + memory) * D + d, mask=live & (d < D), other=0.0),
        tl.load(constants_z + at_block, mask=live, other=0.0),
    )


@triton.jit
def carry_blocks(
    k, block_begin, long_buckets, step_of, weighted, decays, constants, constants_z, carried, carried_z,
    start, T, buckets, capacity, most,
    H: tl.constexpr, NS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Goes along the blocks of a long bucket, for key or for value memory. carried [S, capacity, 2, D], carried_z
    [S, capacity]: the state that a block begins from, or BACKWARD the adjoint that comes to its end from those after
    it; from `constants` of the same shapes, with which each block ends when it begins from zeros."""
    s = tl.program_id(1).to(tl.int64)
    memory = tl.program_id(2)
    b = s // H
    h = s % H
    d = tl.arange(0, BD)
    r = tl.arange(0, STEPS)
    k += ((b * T + start) * H + h) * (NS * D)
    long_buckets += s * (most + 1)
    listed = tl.program_id(0) < tl.load(long_buckets + most)
    begins = block_begin + s * (buckets + 1) + tl.load(long_buckets + tl.program_id(0), mask=listed, other=0)
    first = tl.load(begins, mask=listed, other=0)
    count = tl.load(begins + 1, mask=listed, other=0) - first

    along_chain = -1 if BACKWARD else 1
    at_block = s * capacity + (first + count - 1 if BACKWARD else first)
    state = tl.zeros([BD], tl.float32)
    z = 0.0
    # The map of a block is loaded while the one before it is applied, and where its k are, one block earlier still.
    step = tl.load(step_of + at_block * STEPS + r, mask=count > 0, other=-1)
    ahead = load_map(k, step, weighted, decays, constants, constants_z, at_block, memory, count > 0, d, D, BD)
    step = tl.load(step_of + (at_block + along_chain) * STEPS + r, mask=count > 1, other=-1)
    for i in range(count):
        of_block = ahead
        ahead = load_map(
            k, step, weighted, decays, constants, constants_z, at_block + along_chain, memory, i + 1 < count, d, D, BD
        )  # fmt: skip
        step = tl.load(step_of + (at_block + 2 * along_chain) * STEPS + r, mask=i + 2 < count, other=-1)
        tl.store(carried + (at_block * 2 + memory) * D + d, state, mask=d < D)
        if memory == 0:
            tl.store(carried_z + at_block, z)
        keys = of_block[0].to(tl.float32)
        if BACKWARD:
            along = tl.sum(keys * state[None, :], 1)
            taken = tl.sum(of_block[1] * along[:, None], 0)
        else:
            along = tl.sum(of_block[1] * state[None, :], 1)
            taken = tl.sum(keys * along[:, None], 0)
        state = of_block[2] * (state - taken) + of_block[3]
        z = of_block[2] * z + of_block[4]
        at_block += along_chain


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
