"""The Triton kernels of BD-LRU.

A program is one warp. Its 32 lanes are 32 rows of whole blocks, which never mix with other rows, and it walks through
the tokens of one chunk: forward, or in the backward pass from the last to the first. In a forward walk lane k*m + i
holds row i of block k's matrix in m registers, in a backward walk column i. Either way the lane's next state is a sum
over its registers times states that shuffles fetch from the m lanes of its block. What a token needs is loaded AHEAD
tokens before it is used, into a ring of registers, so that few warps suffice to keep the memory busy.

Chunks are counted in the order of the walk. `v`, `h` and their gradients are [B, T, WIDTH], gates and their gradient
[B, T, WIDTH, M+1], doc_start [B, T] or None; states are float32 [B, WIDTH].
"""

from __future__ import annotations

# Bodies of kernels are Triton's language, in which types are those of blocks on a GPU.
# mypy: ignore-errors
import triton
import triton.language as tl

LANES = tl.constexpr(32)
# Below this block size a lane of a forward walk loads its row itself. Longer rows would touch too many cache lines.
LONG_ROW = tl.constexpr(8)


@triton.jit
def compose_chunks(
    v,  # in the backward walk grad_h
    gates,
    doc_start,
    maps,
    cuts,
    length,
    chunk,
    chunks,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    AHEAD: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Writes the affine map of every chunk but the last as float32 [B, chunks-1, WIDTH, M+1], like gates of v = 1.

    A token's map is h -> A h + a0 v, or g -> A^T (g + grad_h) backward; A counts as zero where a document starts. In
    `cuts` [B, chunks-1] a chunk with such a token gets its index, another -1: doc_start for the chunks as tokens.
    """
    index, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, block = _lanes(M)
    places = _places(M, BACKWARD)
    first, count = _walk(index, length, chunk, chunks, BACKWARD)
    token = batch * length + first
    SIGN: tl.constexpr = -1 if BACKWARD else 1
    ring = ()
    for u in tl.static_range(AHEAD):
        ring += (_load(v, gates, doc_start, token + SIGN * u, places, u < count, WIDTH, M, BACKWARD),)

    product = tl.where(row[None, :] % M == tl.arange(0, M)[:, None], 1.0, 0.0)  # [column, lane]
    vector = tl.zeros([LANES], tl.float32)
    cut = -1
    sources = tl.broadcast_to(block[:, None, :], [M, M, LANES])
    for group in range(0, count, AHEAD):
        at, t = token + SIGN * group, first + SIGN * group
        for u in tl.static_range(AHEAD):
            matrix, gate, x, doc = ring[0]
            ahead, here = at + SIGN * (u + AHEAD), group + (u + AHEAD) < count
            ring = ring[1:]
            ring += (_load(v, gates, doc_start, ahead, places, here, WIDTH, M, BACKWARD),)
            factors, x = _factors(matrix, M, BACKWARD), x.to(tl.float32)
            next_vector = vector + x if BACKWARD else vector
            next_vector = tl.sum(factors * _fetch(next_vector, block), 0)
            columns = tl.gather(tl.broadcast_to(product[None, :, :], [M, M, LANES]), sources, 2)
            next_product = tl.sum(factors[:, None, :] * columns, 0)
            here = group + u < count
            if doc_start is not None:
                starts = doc == t + SIGN * u
                cut = tl.where(here & starts, index, cut)
                next_product, next_vector = tl.where(starts, 0.0, next_product), tl.where(starts, 0.0, next_vector)
            if not BACKWARD:
                next_vector += gate.to(tl.float32) * x
            product, vector = tl.where(here, next_product, product), tl.where(here, next_vector, vector)

    exists = row < WIDTH
    maps += (batch * (chunks - 1) + index) * (WIDTH * (M + 1)) + row * (M + 1)
    tl.store(maps[None, :] + tl.arange(0, M)[:, None], product, mask=exists[None, :])
    tl.store(maps + M, vector, mask=exists)
    if doc_start is not None and tl.program_id(0) == 0:
        tl.store(cuts + batch * (chunks - 1) + index, cut)


@triton.jit
def scan_chunks(
    v,  # None: ones
    gates,
    doc_start,
    state,
    carried,
    h,
    leaving,
    length,
    chunk,
    chunks,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """h_t = A_t h_(t-1) + a0_t v_t through every chunk.

    The first chunk starts from `state`, the others from `carried` [B, chunks-1, WIDTH]. The state after the last token
    goes to `leaving`, unless that is None.
    """
    index, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, block = _lanes(M)
    exists = row < WIDTH
    places = _places(M, False)
    first, count = _walk(index, length, chunk, chunks, False)
    token = batch * length + first
    ring = ()
    for u in tl.static_range(AHEAD):
        ring += (_load(v, gates, doc_start, token + u, places, u < count, WIDTH, M, False),)

    current = tl.load(_entering(state, carried, batch, index, chunks, WIDTH) + row, mask=exists, other=0.0)
    for group in range(0, count, AHEAD):
        at, t = token + group, first + group
        for u in tl.static_range(AHEAD):
            matrix, gate, x, doc = ring[0]
            here = group + (u + AHEAD) < count
            ring = ring[1:]
            ring += (_load(v, gates, doc_start, at + (u + AHEAD), places, here, WIDTH, M, False),)
            if doc_start is not None:
                current = tl.where(doc == t + u, 0.0, current)
            entered = gate.to(tl.float32)
            if v is not None:
                entered *= x.to(tl.float32)
            following = tl.sum(_factors(matrix, M, False) * _fetch(current, block), 0) + entered
            here = group + u < count
            current = tl.where(here, following, current)
            tl.store(h + (at + u) * WIDTH + row, current, mask=_mask(row, here, WIDTH))

    if leaving is not None:
        tl.store(leaving + batch * WIDTH + row, current, mask=exists & (first + count == length))


@triton.jit
def scan_chunks_backward(
    grad_h,
    v,
    gates,
    doc_start,
    state,
    h,
    grad_leaving,
    carried,
    grad_v,
    grad_gates,
    grad_state,
    length,
    chunk,
    chunks,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """g_t = grad_h_t + A_(t+1)^T g_(t+1) through every chunk, and every gradient from it.

    The first chunk of the walk, the last in time, starts from `grad_leaving`, the others from `carried`
    [B, chunks-1, WIDTH]. The gradient of a row of gates is the row's g_t times (its block's h_(t-1), its v_t).
    """
    index, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, block = _lanes(M)
    exists = row < WIDTH
    places = _places(M, True)
    first, count = _walk(index, length, chunk, chunks, True)
    token = batch * length + first
    ring = ()
    for u in tl.static_range(AHEAD):
        ring += (_load_backward(grad_h, v, gates, doc_start, h, token - u, first - u, places, u < count, WIDTH, M),)

    entering = tl.load(state + batch * WIDTH + row, mask=exists, other=0.0)
    passed = tl.load(_entering(grad_leaving, carried, batch, index, chunks, WIDTH) + row, mask=exists, other=0.0)
    most, rest = _gates_in_order(0, M, M), _gates_in_order(M, 1, M)
    for group in range(0, count, AHEAD):
        at, t = token - group, first - group
        for u in tl.static_range(AHEAD):
            matrix, gate, x, doc, grad, before = ring[0]
            ahead, here = u + AHEAD, group + (u + AHEAD) < count
            ring = ring[1:]
            ring += (_load_backward(grad_h, v, gates, doc_start, h, at - ahead, t - ahead, places, here, WIDTH, M),)
            before = tl.where(t - u > 0, before.to(tl.float32), entering)
            g = grad.to(tl.float32) + passed
            following = tl.sum(_factors(matrix, M, True) * _fetch(g, block), 0)
            if doc_start is not None:
                starts = doc == t - u
                before = tl.where(starts, 0.0, before)
                following = tl.where(starts, 0.0, following)
            here = group + u < count
            passed = tl.where(here, following, passed)
            tl.store(grad_v + (at - u) * WIDTH + row, g * gate.to(tl.float32), mask=_mask(row, here, WIDTH))
            to = grad_gates + (at - u) * (WIDTH * (M + 1)) + tl.program_id(0) * (LANES * (M + 1))
            x = x.to(tl.float32)
            _store_grad_gates(to, most, g, before, x, here, WIDTH)
            _store_grad_gates(to, rest, g, before, x, here, WIDTH)

    tl.store(grad_state + batch * WIDTH + row, passed, mask=exists & (index == chunks - 1))


@triton.jit
def _lanes(M: tl.constexpr):
    """The row of every lane, and the lanes of its block [M, LANES]."""
    lane = tl.arange(0, LANES)
    return tl.program_id(0) * LANES + lane, lane[None, :] // M * M + tl.arange(0, M)[:, None]


@triton.jit
def _walk(index, length, chunk, chunks, BACKWARD: tl.constexpr):
    """A chunk's first token in the order of the walk, and its number of tokens."""
    start = (chunks - 1 - index if BACKWARD else index) * chunk
    count = tl.minimum(chunk, length - start)
    return (start + count - 1 if BACKWARD else start), count


@triton.jit
def _entering(state, carried, batch, index, chunks, WIDTH: tl.constexpr):
    """Pointer to what enters a chunk."""
    source = state + batch * WIDTH
    if carried is not None and index > 0:
        source = carried + (batch * (chunks - 1) + index - 1) * WIDTH
    return source


@triton.jit
def _mask(row, here, WIDTH: tl.constexpr):
    """The rows that exist, where `here`. Mostly all do, and a scalar spares a predicate for every number."""
    if LANES * (WIDTH // LANES) == WIDTH:
        return here
    else:
        return (row < WIDTH) & here


@triton.jit
def _places(M: tl.constexpr, BACKWARD: tl.constexpr):
    """Which of the program's gates [M, LANES] the lanes load as matrices, and which rows these belong to.

    Neighbouring lanes load neighbouring numbers: backward the columns of a block, which is as the walk wants them, and
    forward whole rows, which `_factors` hands round.
    """
    lane, load = tl.arange(0, LANES)[None, :], tl.arange(0, M)[:, None]
    row = lane // M * M + load if BACKWARD else lane // M + load * (LANES // M)
    return row * (M + 1) + lane % M, tl.program_id(0) * LANES + row


@triton.jit
def _load(v, gates, doc_start, token, places, here, WIDTH: tl.constexpr, M: tl.constexpr, BACKWARD: tl.constexpr):
    """A token's matrices, its input gates, v and document's start; () for what there is not."""
    first, lane = tl.program_id(0) * LANES, tl.arange(0, LANES)
    mask = _mask(first + lane, here, WIDTH)
    gates += token * (WIDTH * (M + 1)) + first * (M + 1)
    x, doc = (), ()
    if v is not None:
        x = tl.load(v + token * WIDTH + first + lane, mask=mask)
    if doc_start is not None:
        doc = tl.load(doc_start + token, mask=here)
    if M < LONG_ROW and not BACKWARD:
        columns = ()
        for j in tl.static_range(M):
            columns += (tl.load(gates + lane * (M + 1) + j, mask=mask),)
        matrix = tl.permute(_join(columns, M), (1, 0))
    else:
        place, row = places
        matrix = tl.load(gates + place, mask=_mask(row, here, WIDTH))
    return matrix, tl.load(gates + lane * (M + 1) + M, mask=mask), x, doc


@triton.jit
def _join(parts, N: tl.constexpr):
    """N times [LANES] -> [LANES, N]."""
    if N == 1:
        return tl.reshape(parts[0], [LANES, 1])
    else:
        pair = tl.join(_join(parts[: N // 2], N // 2), _join(parts[N // 2 :], N // 2))
        return tl.reshape(tl.permute(pair, (0, 2, 1)), [LANES, N])


@triton.jit
def _load_backward(grad_h, v, gates, doc_start, h, token, t, places, here, WIDTH: tl.constexpr, M: tl.constexpr):
    """The same for the backward walk, with the gradient of h and the h before, which a row's token 0 lacks."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask, place = _mask(row, here, WIDTH), token * WIDTH + row
    matrix, gate, x, doc = _load(v, gates, doc_start, token, places, here, WIDTH, M, True)
    before = tl.load(h + (place - WIDTH), mask=mask & (t > 0))
    return matrix, gate, x, doc, tl.load(grad_h + place, mask=mask), before


@triton.jit
def _factors(matrix, M: tl.constexpr, BACKWARD: tl.constexpr):
    """The factors [M, LANES] of every lane, from what `_load` returned."""
    if M < LONG_ROW or BACKWARD:
        return matrix.to(tl.float32)
    else:
        # [load, lane] -> [column, row]. `split` wants both halves in a lane's registers, so there numbers change lanes.
        tile = tl.permute(tl.reshape(matrix.to(tl.float32), [M, LANES // M, M]), (2, 0, 1))
        low, high = tl.split(tl.permute(tl.reshape(tile, [2, M // 2, LANES]), (1, 2, 0)))
        return tl.reshape(tl.permute(tl.join(low, high), (2, 0, 1)), [M, LANES])


@triton.jit
def _fetch(x, lane):
    """x [LANES] of other lanes: [N, LANES] for lane [N, LANES]."""
    return tl.gather(tl.broadcast_to(x[None, :], lane.shape), lane, 1)


@triton.jit
def _gates_in_order(first, N: tl.constexpr, M: tl.constexpr):
    """N times LANES neighbours among the program's gates, the lanes of their rows and of the h that they multiply, and
    whether they multiply v instead."""
    place = (first + tl.arange(0, N)[:, None]) * LANES + tl.arange(0, LANES)[None, :]
    row, column = place // (M + 1), place % (M + 1)
    # Said to be aligned to nothing, lest a lane stores four neighbours: loads would then be dealt out like that too.
    return tl.multiple_of(place, [1, 1]), row, row // M * M + tl.minimum(column, M - 1), column == M


@triton.jit
def _store_grad_gates(grad_gates, places, g, before, x, here, WIDTH: tl.constexpr):
    """Lanes write neighbouring numbers, so that whole cache lines go out."""
    place, row, block_lane, is_input = places
    factor = tl.where(is_input, _fetch(x, row), _fetch(before, block_lane))
    mask = _mask(tl.program_id(0) * LANES + row, here, WIDTH)
    tl.store(grad_gates + place, _fetch(g, row) * factor, mask=mask)
