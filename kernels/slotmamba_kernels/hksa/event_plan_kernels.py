"""Kernels of the event plan: a radix sort of each stream's events by slot, then the links between them.

A sort pass is three launches: `rank_kernel` counts the digits of every block of events and ranks its events among
those of the same digit, `scan_kernel` turns the counts into the places where each block's digits begin and
`scatter_kernel` moves the events. What moves is one 64-bit word, slot << 32 | event: sorted words are in (slot, time)
order, since a stream's event numbers grow with time. `link_kernel` then looks at neighbours. Writes and reads are
sorted by the same launches, told apart by the last grid axis.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(32)
"""Events that `rank_kernel` takes at once: the bits of the words in which it keeps who shares a digit."""


@triton.jit
def _slot_of(word):
    return (word >> 32).to(tl.int32)


@triton.jit
def _event_of(word):
    return word.to(tl.int32)


@triton.jit
def _stream_row(stream, token, tokens, heads):
    """Row of the stream at a token, counted from the call's first, in [B, T, H]; 64-bit."""
    return (stream // heads * tokens + token) * heads + stream % heads


@triton.jit
def _words(
    idx, words, stream, position, valid, start, count, tokens, heads, PER_TOKEN: tl.constexpr, FIRST: tl.constexpr
):
    """The event words at positions of a stream: from the slots in the first pass, then what the pass before sorted."""
    if FIRST:
        row = _stream_row(stream, (start + position // PER_TOKEN).to(tl.int64), tokens, heads)
        slot = tl.load(idx + row * PER_TOKEN + position % PER_TOKEN, mask=valid, other=0)
        word = (slot.to(tl.int64) << 32) | position.to(tl.int64)
    else:
        word = tl.load(words + stream.to(tl.int64) * count + position, mask=valid, other=0)
    return word


@triton.jit
def _digit(word, shift, BITS: tl.constexpr):
    return (_slot_of(word) >> shift) & ((1 << BITS) - 1)


@triton.jit
def _ballot(flag, lane):
    """One word with the flags (0 or 1, uint32) of a chunk as its bits."""
    return tl.sum(flag << lane, 0)


@triton.jit
def _count_bits(x):
    """Ones in each uint32. No step passes 32 bits: the interpreter adds up in 64."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 63


@triton.jit
def _rank(
    idx, words, ranks, counts, stream, start, count, tokens, heads, shift,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    first = block * BLOCK
    if first < count:
        blocks = (count + BLOCK - 1) // BLOCK
        counts += (stream.to(tl.int64) * blocks + block) * (1 << BITS)
        ranks += stream.to(tl.int64) * count
        tl.store(counts + tl.arange(0, 1 << BITS), tl.zeros([1 << BITS], tl.int32))
        tl.debug_barrier()

        lane = tl.arange(0, CHUNK)
        below = (tl.full([CHUNK], 1, tl.uint32) << lane.to(tl.uint32)) - 1
        end = tl.minimum(first + BLOCK, count)
        # The chunks after the present one are on their way while it is counted.
        near, far = first + lane, first + CHUNK + lane
        word = _words(idx, words, stream, near, near < end, start, count, tokens, heads, PER_TOKEN, FIRST)
        following = _words(idx, words, stream, far, far < end, start, count, tokens, heads, PER_TOKEN, FIRST)
        for begin in range(first, end, CHUNK):
            position = begin + lane
            later = position + 2 * CHUNK
            after = _words(idx, words, stream, later, later < end, start, count, tokens, heads, PER_TOKEN, FIRST)
            digit = _digit(word, shift, BITS)
            valid = position < end

            # The lanes that hold the same digit as each lane, as bits: those that agree with it in every bit of it.
            bit = lane.to(tl.uint32)
            alike = _ballot(valid.to(tl.uint32), bit)
            for i in tl.static_range(BITS):
                flag = (digit.to(tl.uint32) >> i) & 1
                ones = _ballot(flag, bit)
                alike = alike & tl.where(flag != 0, ones, ones ^ 0xFFFFFFFF)

            # Counts live in global memory (this program's own, so in the first-level cache): registers cannot be
            # looked up by digit. Loads and stores of the chunk are kept apart by barriers.
            seen = tl.load(counts + digit, mask=valid, other=0)
            rank = seen + _count_bits(alike & below).to(tl.int32)
            tl.store(ranks + position, rank, mask=valid)
            tl.debug_barrier()
            tl.store(counts + digit, rank + 1, mask=valid & ((alike >> bit) == 1))  # by the last lane of a digit
            tl.debug_barrier()
            word = following
            following = after


@triton.jit(do_not_specialize=["start", "write_count", "read_count", "tokens", "heads", "shift"])
def rank_kernel(
    write_idx, read_idx, write_words, read_words, write_ranks, read_ranks, write_counts, read_counts,
    start, write_count, read_count, tokens, heads, shift,
    WRITES: tl.constexpr, READS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Digit counts [S, blocks, 2^BITS] of blocks of events, and each event's rank among its block's of its digit."""
    stream = tl.program_id(1)
    if tl.program_id(2) == 0:
        _rank(
            write_idx, write_words, write_ranks, write_counts, stream, start, write_count, tokens, heads, shift,
            WRITES, BLOCK, BITS, FIRST,
        )  # fmt: skip
    else:
        _rank(
            read_idx, read_words, read_ranks, read_counts, stream, start, read_count, tokens, heads, shift,
            READS, BLOCK, BITS, FIRST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["write_count", "read_count", "num_buckets", "bucket_digits"])
def scan_kernel(
    write_counts, read_counts, write_bucket, read_bucket, write_count, read_count, num_buckets, bucket_digits,
    BLOCK: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Counts become, in place, the sorted positions of the first events of a block's digits; one program a stream.

    The last pass's digits, bucket_digits to a bucket, give the positions at which buckets begin.
    """
    stream = tl.program_id(0).to(tl.int64)
    counts, buckets, count = write_counts, write_bucket, write_count
    if tl.program_id(1) == 1:
        counts, buckets, count = read_counts, read_bucket, read_count
    blocks = (count + BLOCK - 1) // BLOCK
    counts += stream * blocks * (1 << BITS)
    digit = tl.arange(0, 1 << BITS)
    row = tl.arange(0, ROWS)[:, None]
    tile = counts + (row << BITS) + digit[None, :]

    total = tl.zeros([1 << BITS], tl.int32)
    for begin in range(0, blocks, ROWS):
        total += tl.sum(tl.load(tile + (begin << BITS), mask=begin + row < blocks, other=0), 0)
    place = tl.cumsum(total, 0) - total
    if LAST:
        buckets += stream * (num_buckets + 1)
        bucket = digit // bucket_digits
        tl.store(buckets + bucket, place, mask=(digit % bucket_digits == 0) & (bucket < num_buckets))
        tl.store(buckets + num_buckets, count)
    for begin in range(0, blocks, ROWS):
        inside = begin + row < blocks
        found = tl.load(tile + (begin << BITS), mask=inside, other=0)
        tl.store(tile + (begin << BITS), place[None, :] + tl.cumsum(found, 0) - found, mask=inside)
        place += tl.sum(found, 0)


@triton.jit
def _scatter(
    idx, words, ranks, counts, sorted_words, stream, start, count, tokens, heads, shift,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = position < count
    blocks = (count + BLOCK - 1) // BLOCK
    word = _words(idx, words, stream, position, valid, start, count, tokens, heads, PER_TOKEN, FIRST)
    base = stream.to(tl.int64) * count
    counts += (stream.to(tl.int64) * blocks + tl.program_id(0) * TILE // BLOCK) * (1 << BITS)
    place = tl.load(counts + _digit(word, shift, BITS), mask=valid, other=0)
    place += tl.load(ranks + base + position, mask=valid, other=0)
    tl.store(sorted_words + base + place, word, mask=valid)


@triton.jit(do_not_specialize=["start", "write_count", "read_count", "tokens", "heads", "shift"])
def scatter_kernel(
    write_idx, read_idx, write_words, read_words, write_ranks, read_ranks, write_counts, read_counts,
    sorted_writes, sorted_reads, read_range, start, write_count, read_count, tokens, heads, shift,
    WRITES: tl.constexpr, READS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """Moves the events to where a pass puts them. Leaves read_range empty, for `link_kernel` to fill in."""
    stream = tl.program_id(1)
    if tl.program_id(2) == 0:
        _scatter(
            write_idx, write_words, write_ranks, write_counts, sorted_writes, stream, start, write_count, tokens, heads,
            shift, WRITES, BLOCK, TILE, BITS, FIRST,
        )  # fmt: skip
        flat = tl.program_id(0) * 2 * TILE + tl.arange(0, 2 * TILE)
        empty = read_range + 2 * stream.to(tl.int64) * write_count
        tl.store(empty + flat, tl.zeros([2 * TILE], tl.int32), mask=flat < 2 * write_count)
    else:
        _scatter(
            read_idx, read_words, read_ranks, read_counts, sorted_reads, stream, start, read_count, tokens, heads,
            shift, READS, BLOCK, TILE, BITS, FIRST,
        )  # fmt: skip


@triton.jit
def _document_begin(doc_start, stream, time, valid, start, tokens, heads, DOCUMENTS: tl.constexpr):
    """First token of the document at a time, both counted from the stretch's first; negative if it began before."""
    if DOCUMENTS:
        row = (stream // heads).to(tl.int64) * tokens + start + time
        begin = (tl.load(doc_start + row, mask=valid, other=0) - start).to(tl.int32)
    else:
        begin = tl.zeros_like(time) - 1
    return begin


@triton.jit
def _row_of(slot, wanted, slots, stream, count, MEMORY: tl.constexpr):
    """Row of a slot in an entering or leaving memory, or -1: the slot itself, or its place among `slots` [S, count]."""
    if MEMORY == "none":
        row = tl.zeros_like(slot) - 1
    elif MEMORY == "dense":
        row = slot
    else:
        slots += stream.to(tl.int64) * count
        low = tl.zeros_like(slot)
        high = tl.where(wanted, count, 0)
        width = tl.max(high, 0)
        while width > 0:
            middle = (low + high) >> 1
            found = tl.load(slots + middle, mask=low < high, other=0)
            higher = (low < high) & (found < slot)
            high = tl.where(higher, high, middle)
            low = tl.where(higher, middle + 1, low)
            width = width >> 1
        there = tl.load(slots + low, mask=wanted & (low < count), other=-1) == slot
        row = tl.where(there, low, -1)
    return row


@triton.jit
def _source(last, follows, slot, begin, valid, slots, stream, count, ENTERING: tl.constexpr):
    """Code of a state: the write `last` where there is one to follow, else a row of the entering memory, else none."""
    enters = valid & (begin < 0) & (follows == 0)
    row = _row_of(slot, enters, slots, stream, count, ENTERING)
    return tl.where(follows, last, tl.where(enters & (row >= 0), -2 - row, -1))


@triton.jit
def _link_writes(
    sorted_writes, doc_start, entering_slots, leaving_slots, write_order, previous, leaving, write_source,
    stream, start, length, tokens, heads, entering_rows, leaving_rows,
    WRITES: tl.constexpr, TILE: tl.constexpr, DOCUMENTS: tl.constexpr, ENTERING: tl.constexpr, LEAVING: tl.constexpr,
):  # fmt: skip
    count = length * WRITES
    base = stream.to(tl.int64) * count
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = position < count
    words = sorted_writes + base + position
    word = tl.load(words, mask=valid, other=0)
    before = tl.load(words - 1, mask=valid & (position > 0), other=-1)
    after = tl.load(words + 1, mask=position + 1 < count, other=-1)
    slot, event = _slot_of(word), _event_of(word)
    time = event // WRITES
    begin = _document_begin(doc_start, stream, time, valid, start, tokens, heads, DOCUMENTS)

    last = _event_of(before)
    follows = (_slot_of(before) == slot) & (last // WRITES >= begin)
    source = _source(last, follows, slot, begin, valid, entering_slots, stream, entering_rows, ENTERING)
    leaves = valid & (_slot_of(after) != slot)
    if DOCUMENTS:
        last_token = tl.zeros_like(time) + length - 1
        leaves &= time >= _document_begin(doc_start, stream, last_token, leaves, start, tokens, heads, True)
    row = _row_of(slot, leaves, leaving_slots, stream, leaving_rows, LEAVING)

    tl.store(write_order + base + position, event, mask=valid)
    tl.store(previous + base + position, source, mask=valid)
    tl.store(leaving + base + position, tl.where(leaves, row, -1), mask=valid)
    target = _stream_row(stream, time.to(tl.int64), length, heads) * WRITES + event % WRITES
    tl.store(write_source + target, source, mask=valid)


@triton.jit
def _link_reads(
    sorted_writes, sorted_reads, write_bucket, doc_start, entering_slots, read_order, read_range, read_source,
    stream, start, length, tokens, heads, entering_rows, num_buckets, shift,
    WRITES: tl.constexpr, READS: tl.constexpr, TILE: tl.constexpr, DOCUMENTS: tl.constexpr, ENTERING: tl.constexpr,
):  # fmt: skip
    count = length * READS
    base = stream.to(tl.int64) * count
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = position < count
    words = sorted_reads + base + position
    word = tl.load(words, mask=valid, other=0)
    slot, event = _slot_of(word), _event_of(word)
    time = event // READS
    begin = _document_begin(doc_start, stream, time, valid, start, tokens, heads, DOCUMENTS)

    # The writes of the same slot up to this time end where the first word above this one is.
    sorted_writes += stream.to(tl.int64) * length * WRITES
    write_bucket += stream.to(tl.int64) * (num_buckets + 1) + (slot >> shift)
    latest = (slot.to(tl.int64) << 32) + (time + 1) * WRITES
    bucket = tl.load(write_bucket, mask=valid, other=0)
    low = bucket
    high = tl.load(write_bucket + 1, mask=valid, other=0)
    width = tl.max(high - low, 0)
    while width > 0:
        middle = (low + high) >> 1
        found = tl.load(sorted_writes + middle, mask=low < high, other=0)
        higher = (low < high) & (found < latest)
        high = tl.where(higher, high, middle)
        low = tl.where(higher, middle + 1, low)
        width = width >> 1
    write = low - 1
    last = tl.load(sorted_writes + write, mask=valid & (write >= bucket), other=-1)
    written = _event_of(last) // WRITES
    follows = (_slot_of(last) == slot) & (written >= begin)
    source = _source(_event_of(last), follows, slot, begin, valid, entering_slots, stream, entering_rows, ENTERING)
    tl.store(read_order + base + position, event, mask=valid)
    target = _stream_row(stream, time.to(tl.int64), length, heads) * READS + event % READS
    tl.store(read_source + target, source, mask=valid)

    # The first and the last of the reads that see a write say so.
    before = tl.load(words - 1, mask=valid & (position > 0), other=-1)
    opens = (_slot_of(before) != slot) | (_event_of(before) // READS < written)
    after = tl.load(words + 1, mask=position + 1 < count, other=-1)
    later = _event_of(after) // READS
    rewritten = tl.load(sorted_writes + low, mask=valid & (low < length * WRITES), other=-1)
    closes = (_slot_of(after) != slot) | ((_slot_of(rewritten) == slot) & (_event_of(rewritten) // WRITES <= later))
    if DOCUMENTS:
        inside = valid & (closes == 0)
        closes = closes | (_document_begin(doc_start, stream, later, inside, start, tokens, heads, True) > written)
    range_of = read_range + 2 * (stream.to(tl.int64) * length * WRITES + write)
    tl.store(range_of, position, mask=valid & follows & opens)
    tl.store(range_of + 1, position + 1, mask=valid & follows & closes)


@triton.jit(
    do_not_specialize=[
        "start", "length", "tokens", "heads", "entering_rows", "leaving_rows", "num_buckets", "shift"
    ]
)  # fmt: skip
def link_kernel(
    sorted_writes, sorted_reads, write_bucket, doc_start, entering_slots, leaving_slots,
    write_order, previous, leaving, write_source, read_order, read_range, read_source,
    start, length, tokens, heads, entering_rows, leaving_rows, num_buckets, shift,
    WRITES: tl.constexpr, READS: tl.constexpr, TILE: tl.constexpr, DOCUMENTS: tl.constexpr, ENTERING: tl.constexpr,
    LEAVING: tl.constexpr,
):  # fmt: skip
    """From the sorted words, everything that `EventPlan` says of writes and of reads."""
    stream = tl.program_id(1)
    if tl.program_id(2) == 0:
        _link_writes(
            sorted_writes, doc_start, entering_slots, leaving_slots, write_order, previous, leaving, write_source,
            stream, start, length, tokens, heads, entering_rows, leaving_rows,
            WRITES, TILE, DOCUMENTS, ENTERING, LEAVING,
        )  # fmt: skip
    else:
        _link_reads(
            sorted_writes, sorted_reads, write_bucket, doc_start, entering_slots, read_order, read_range, read_source,
            stream, start, length, tokens, heads, entering_rows, num_buckets, shift,
            WRITES, READS, TILE, DOCUMENTS, ENTERING,
        )  # fmt: skip
