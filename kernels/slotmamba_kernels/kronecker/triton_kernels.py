"""Triton kernels of Kronecker addressing.

Tiles are [candidates, rows], rows running along the threads: where there are few candidates a thread holds all of its
row, and reductions over candidates need no shuffles.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Larger than any candidate's number, which is at most BEAM * P.
_NEVER = tl.constexpr(1 << 30)


@triton.jit
def load_factor(pointers, first, SIZE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits [P, ROWS] of entries `first`, ... of a factor, float32, -inf beyond SIZE; pointers [1, ROWS] to entry 0.

    Loads decide how threads share a tile. A load of the whole tile would give a row to several threads, to read whole
    cache lines, and all that follows would need shuffles; where a thread can have rows to itself (ROWS >= 32), entries
    are loaded one by one. Sizes of 2 and 4 are a single load of a thread as they are.
    """
    entry = first + tl.arange(0, P)[:, None]
    if ROWS < 32 or SIZE == 2 or SIZE == 4:
        return tl.load(pointers + entry, mask=entry < SIZE, other=-float("inf")).to(tl.float32)
    tile = tl.full([P, ROWS], -float("inf"), tl.float32)
    for j in tl.static_range(SIZE):
        tile = tl.where(entry == j, tl.load(pointers + j).to(tl.float32), tile)
    return tile


@triton.jit
def empty_beam(BEAM: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The beam before the first factor, the empty prefix: sums, prefixes [BEAM, ROWS], normaliser [1, ROWS]."""
    rank = tl.arange(0, BEAM)[:, None]
    prefixes = tl.zeros([BEAM, ROWS], tl.int32)
    sums = tl.where(rank == 0, 0.0, -float("inf")) + tl.zeros([BEAM, ROWS], tl.float32)
    return sums, prefixes, tl.full([1, ROWS], 1.0, tl.float32)


@triton.jit
def merge_factor(  # type: ignore[no-untyped-def]
    sums, prefixes, logits, SIZE: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BEAM: tl.constexpr, ROWS: tl.constexpr
):
    """The K best of (prefixes in the beam) x (entries of one more factor), heaviest first.

    Of each entry only the best prefix that is not taken yet can be next: K rounds take the best of these P heads and
    move it on to its entry's next prefix. Candidates are numbered (rank of the prefix) * P + entry; of equal sums the
    smallest number goes first.

    sums, prefixes: [BEAM, ROWS], sums sorted; ranks that do not exist have the sum -inf. logits: [P, ROWS], -inf
    beyond SIZE. Returns the new sums and prefixes, and [1, ROWS] the factor's normaliser.
    """
    rank = tl.arange(0, BEAM)[:, None]
    digit = tl.arange(0, P)[:, None]
    entries = logits - tl.max(logits, 0)[None, :]
    normaliser = tl.sum(tl.exp(entries), 0)[None, :]
    # NaN compares with nothing, and a round that finds no maximum would leave the range of the slots. The normaliser is
    # NaN as well and carries it to the weights.
    entries = tl.where(entries == entries, entries, -float("inf"))
    heads = entries + tl.max(sums, 0)[None, :]
    # Candidates that do not exist have the sum -inf too, but larger numbers than those that do.
    numbers = tl.where(digit < SIZE, digit, _NEVER) + tl.zeros([P, ROWS], tl.int32)
    new_sums = tl.full([BEAM, ROWS], -float("inf"), tl.float32)
    new_prefixes = tl.zeros([BEAM, ROWS], tl.int32)
    for r in range(K):
        best = tl.max(heads, 0)
        number = tl.min(tl.where(heads == best[None, :], numbers, _NEVER), 0)
        taken = (number // P)[None, :]
        prefix = tl.sum(tl.where(rank == taken, prefixes, 0), 0) * SIZE + number % P
        following = tl.max(tl.where(rank == taken + 1, sums, -float("inf")), 0)
        moves = numbers == number[None, :]
        heads = tl.where(moves, entries + following[None, :], heads)
        numbers = tl.where(moves, numbers + P, numbers)
        new_sums = tl.where(rank == r, best[None, :], new_sums)
        new_prefixes = tl.where(rank == r, prefix[None, :], new_prefixes)
    return new_sums, new_prefixes, normaliser


@triton.jit
def topk_forward(  # type: ignore[no-untyped-def]
    logits_ptr,
    indices_ptr,
    weights_ptr,
    rows,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BEAM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of logits [rows, FACTORS, SIZE] -> indices, weights [rows, K]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the last repeat it and are not stored.
    pointers = logits_ptr + tl.minimum(row, rows - 1)[None, :] * (FACTORS * SIZE)
    sums, prefixes, normaliser = empty_beam(BEAM, ROWS)
    for u in range(FACTORS):
        logits = load_factor(pointers + u * SIZE, 0, SIZE, P, ROWS)
        sums, prefixes, total = merge_factor(sums, prefixes, logits, SIZE, K, P, BEAM, ROWS)
        normaliser *= total  # at most p^U in all
    rank = tl.arange(0, BEAM)[:, None]
    out = row[None, :] * K + rank
    stored = (rank < K) & (row < rows)[None, :]
    tl.store(indices_ptr + out, prefixes, mask=stored)
    tl.store(weights_ptr + out, tl.exp(sums) / normaliser, mask=stored)


@triton.jit
def topk_backward(  # type: ignore[no-untyped-def]
    logits_ptr,
    indices_ptr,
    weights_ptr,
    d_weights_ptr,
    d_logits_ptr,
    rows,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BEAM: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d_logits[u, j] = sum over the kept slots of d_weight * weight * ((digit u of the slot is j) - softmax_u[j]).

    CHUNK entries of a factor at a time.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < rows)[None, :]
    row = tl.minimum(row, rows - 1)[None, :]
    rank = tl.arange(0, BEAM)[:, None]
    kept = row * K + rank
    rest = tl.load(indices_ptr + kept, mask=rank < K, other=0)
    weights = tl.load(weights_ptr + kept, mask=rank < K, other=0.0)
    pulls = tl.load(d_weights_ptr + kept, mask=rank < K, other=0.0) * weights  # [BEAM, ROWS]
    total = tl.sum(pulls, 0)[None, :]
    for step in range(FACTORS):
        digits = rest % SIZE
        rest = rest // SIZE
        factor = row * (FACTORS * SIZE) + (FACTORS - 1 - step) * SIZE
        logits = load_factor(logits_ptr + factor, 0, SIZE, P, ROWS)
        largest = tl.max(logits, 0)[None, :]
        normaliser = tl.sum(tl.exp(logits - largest), 0)[None, :]
        for start in range(0, P, CHUNK):
            entry = start + tl.arange(0, CHUNK)[:, None]
            part = load_factor(logits_ptr + factor, start, SIZE, CHUNK, ROWS)
            picked = tl.sum(tl.where(digits[:, None, :] == entry[None, :, :], pulls[:, None, :], 0.0), 0)
            d_part = picked - tl.exp(part - largest) / normaliser * total
            tl.store(d_logits_ptr + factor + entry, d_part, mask=(entry < SIZE) & live)
