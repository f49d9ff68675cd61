"""Who writes and reads which slot when, for the Triton backend: sorted once, used by every kernel and by backward.

Slots never mix, so a stream (one head of one sequence) falls into chains: the writes of one slot in one document, in
time order. The plan lists each stream's writes and reads sorted by (slot, time), and says of each from which state it
starts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slotmamba_kernels.hksa.event_plan_kernels import link_kernel, rank_kernel, scan_kernel, scatter_kernel
from slotmamba_kernels.hksa.state import MOST_BUCKETS

MAX_DIGIT_BITS = MOST_BUCKETS.bit_length() - 1
"""Of one pass of the sort, whose last counts the buckets: all of M=1024 slots in one pass, M=4^10 in two."""

EVENTS_PER_BUCKET = 16
"""At least, on average, or a bucket is made of several slots. Few, since a bucket's writes wait for each other."""

RANK_PROGRAMS = 2048
MIN_BLOCK, MAX_BLOCK = 512, 4096
SCAN_ROWS = 16
TILE = 512


@dataclass(frozen=True)
class EventPlan:
    """The sorted writes and reads of a stretch of L tokens; all tensors int32 and contiguous.

    There are S = B*H streams, number b*H + h, of N = L*K writes and R = L*K' reads each. A write is known by its event
    number t*K + j, a read by t*K' + j, t counted from the stretch's first token. A state is known by a code:

        e >= 0: the state after write e of the stream;   -1: the initial, empty state;
        x <= -2: row -2-x of the entering memory.

    write_order: [S, N] writes sorted by (slot, time). What follows "by position" goes by the position in it.
    previous: [S, N] by position, code of the state that the write starts from.
    leaving: [S, N] by position, row of the leaving memory that the state after the write is; -1 if another write
        of the slot comes later, or the write's document is not the one alive at the end, or there is no such row.
    write_bucket: [S, NB+1] positions at which buckets begin, NB = num_buckets; the last entry is N. The bucket of a
        slot is slot >> bucket_shift(M, N), or the slot itself: NB = M.
    read_order: [S, R] reads sorted by (slot, time).
    read_bucket: [S, NB+1] the same as write_bucket, for reads.
    read_range: [S, N, 2] by position of the write, [begin, end) in read_order of the reads that see the state after it;
        begin = end where no read does. A write of token t is seen by the reads of token t.
    write_source: [B, L, H, K] `previous` by event.
    read_source: [B, L, H, K'] code of the state that each read sees.
    """

    write_order: Tensor
    previous: Tensor
    leaving: Tensor
    write_bucket: Tensor
    read_order: Tensor
    read_bucket: Tensor
    read_range: Tensor
    write_source: Tensor
    read_source: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        heads: int,
        writes: int,
        reads: int,
        num_slots: int,
        device: torch.device,
        bucket_per_slot: bool = False,
    ) -> EventPlan:
        """A plan of this size that says nothing yet: B, L, H, K, K', M."""
        streams, events = batch * heads, length * writes
        shift = 0 if bucket_per_slot else bucket_shift(num_slots, events)
        buckets = ((num_slots - 1) >> shift) + 1

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            write_order=empty(streams, events),
            previous=empty(streams, events),
            leaving=empty(streams, events),
            write_bucket=empty(streams, buckets + 1),
            read_order=empty(streams, length * reads),
            read_bucket=empty(streams, buckets + 1),
            read_range=empty(streams, events, 2),
            write_source=empty(batch, length, heads, writes),
            read_source=empty(batch, length, heads, reads),
        )

    @property
    def num_buckets(self) -> int:
        return self.write_bucket.shape[1] - 1

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return list(vars(self).values())

    def with_leaving(self, leaving: Tensor) -> EventPlan:
        return replace(self, leaving=leaving)


def bucket_shift(num_slots: int, writes: int) -> int:
    """Bits of a slot below its bucket's, in streams of so many writes."""
    bits = _slot_bits(num_slots)
    return bits - min(bits, MAX_DIGIT_BITS, max(writes // EVENTS_PER_BUCKET, 1).bit_length() - 1)


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv, which takes microseconds when called from Python."""
    return -(-a // b)


def _slot_bits(num_slots: int) -> int:
    return max((num_slots - 1).bit_length(), 1)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of the launches; digits: (shift, bits) of each pass of the sort, least significant first."""

    digits: tuple[tuple[int, int], ...]
    bucket_shift: int
    block: int

    def blocks(self, count: int) -> int:
        return ceil_div(count, self.block)


def _sizes(num_slots: int, streams: int, writes: int, reads: int, bucket_per_slot: bool) -> _Sizes:
    """For streams of so many writes and reads."""
    # The most significant digit is the widest, since buckets are made of it; the others share what is left.
    bits = _slot_bits(num_slots)
    top = min(bits, MAX_DIGIT_BITS)
    digits, shift = [], 0
    for left in range(ceil_div(bits - top, MAX_DIGIT_BITS), 0, -1):
        width = ceil_div(bits - top - shift, left)
        digits.append((shift, width))
        shift += width
    digits.append((shift, top))
    # A warp walks through each block. Enough of them to fill a GPU, but not many more counts than events.
    block = 1 << max(streams * (writes + reads) // RANK_PROGRAMS - 1, 0).bit_length()
    in_bucket = 0 if bucket_per_slot else bucket_shift(num_slots, writes)
    return _Sizes(tuple(digits), in_bucket, min(max(block, MIN_BLOCK), MAX_BLOCK))


def make_event_plan(
    write_idx: Tensor,
    read_idx: Tensor,
    num_slots: int,
    *,
    start: int = 0,
    length: int | None = None,
    doc_start: Tensor | None = None,
    entering: str = "dense",
    entering_slots: Tensor | None = None,
    leaving_slots: Tensor | None = None,
    bucket_per_slot: bool = False,
) -> EventPlan:
    """The plan of the stretch of tokens [start, start + length) of a call, without waiting for the GPU.

    Args:
        write_idx: [B, T, H, K] int32, contiguous; the slots that each token writes, distinct and below num_slots.
        read_idx: [B, T, H, K'] int32, contiguous; the slots that it reads.
        num_slots: slots of a head, M.
        start, length: the stretch; length None reaches to the end.
        doc_start: [B, T] integers, contiguous; index, counted from the call's first token, of the first token of t's
            document. A document that begins before the stretch sees the entering memory. None: there is only that one.
        entering: "none" (no entering memory: what the stretch did not write is empty), "dense" (slot m is row m) or
            "sparse" (its rows are `entering_slots`; a slot that is not among them is empty).
        entering_slots: [B*H, rows] int32, contiguous; slots of the sparse entering memory, ascending, filled up with
            num_slots.
        leaving_slots: the same of the leaving memory; None: slot m is row m.
        bucket_per_slot: make a bucket of every slot, however few its events are; for at most MOST_BUCKETS slots.

    Raises:
        ValueError: shapes, dtypes or a stretch that do not fit.
    """
    batch, tokens, heads, writes = write_idx.shape
    reads = read_idx.shape[3]
    length = tokens - start if length is None else length
    _check(write_idx, read_idx, start, length, doc_start, entering, entering_slots, leaving_slots)
    streams = batch * heads
    counts = (length * writes, length * reads)
    assert num_slots <= MOST_BUCKETS or not bucket_per_slot
    sizes = _sizes(num_slots, streams, *counts, bucket_per_slot)
    plan = EventPlan.empty(batch, length, heads, writes, reads, num_slots, write_idx.device, bucket_per_slot)
    words = _sort(write_idx, read_idx, start, counts, plan, sizes)
    link_kernel[ceil_div(max(counts), TILE), streams, 2](
        *words, plan.write_bucket,
        *(write_idx if x is None else x for x in (doc_start, entering_slots, leaving_slots)),  # not looked at if None
        plan.write_order, plan.previous, plan.leaving, plan.write_source,
        plan.read_order, plan.read_range, plan.read_source,
        start, length, tokens, heads,
        *(0 if x is None else x.shape[1] for x in (entering_slots, leaving_slots)), plan.num_buckets,
        sizes.bucket_shift,
        WRITES=writes, READS=reads, TILE=TILE, DOCUMENTS=doc_start is not None, ENTERING=entering,
        LEAVING="dense" if leaving_slots is None else "sparse", num_warps=4, num_stages=1,
    )  # fmt: skip
    return plan


def _sort(
    write_idx: Tensor, read_idx: Tensor, start: int, counts: tuple[int, int], plan: EventPlan, sizes: _Sizes
) -> list[Tensor]:
    """The words slot << 32 | event of the writes [S, N] and the reads [S, R], sorted. Fills in the plan's buckets."""
    batch, tokens, heads, writes = write_idx.shape
    streams = batch * heads
    per_token = {"WRITES": writes, "READS": read_idx.shape[3]}
    blocks = sizes.blocks(max(counts))
    workspace = _Workspace(write_idx, streams, counts, sizes)
    words = workspace.words[0]  # not looked at in the first pass
    for number, (shift, bits) in enumerate(sizes.digits):
        first, last = number == 0, number == len(sizes.digits) - 1
        shared = (write_idx, read_idx, *words, *workspace.ranks, *workspace.digit_counts)
        where = (start, *counts, tokens, heads, shift)
        rank_kernel[blocks, streams, 2](
            *shared, *where, **per_token, BLOCK=sizes.block, BITS=bits, FIRST=first, num_warps=1, num_stages=1
        )
        scan_kernel[streams, 2](
            *workspace.digit_counts, plan.write_bucket, plan.read_bucket, *counts, plan.num_buckets,
            1 << max(sizes.bucket_shift - shift, 0), BLOCK=sizes.block, BITS=bits, ROWS=SCAN_ROWS, LAST=last,
            num_warps=8, num_stages=1,
        )  # fmt: skip
        words = workspace.words[(number + 1) % 2]
        scatter_kernel[ceil_div(max(counts), TILE), streams, 2](
            *shared, *words, plan.read_range, *where, **per_token, BLOCK=sizes.block, TILE=TILE, BITS=bits,
            FIRST=first, num_warps=4, num_stages=1,
        )  # fmt: skip
    return words


class _Workspace:
    """Scratch memory of the sort, one allocation: words [2][S, N or R], ranks [S, N or R], counts [S, blocks, digits].

    Each comes as a list of the writes' and the reads' part.
    """

    def __init__(self, like: Tensor, streams: int, counts: tuple[int, int], sizes: _Sizes) -> None:
        digits = 1 << max(bits for _, bits in sizes.digits)
        copies = min(len(sizes.digits), 2)
        numbers = [streams * count for count in counts]
        digit_counts = [streams * sizes.blocks(count) * digits for count in counts]
        # In 8 bytes; pieces begin at multiples of 16 bytes, as the compiler is told of fresh tensors.
        pieces = [*numbers * copies, *(ceil_div(x, 2) for x in numbers + digit_counts)]
        pieces = [ceil_div(x, 2) * 2 for x in pieces]
        parts = torch.empty(sum(pieces), dtype=torch.int64, device=like.device).split(pieces)
        self.words = [parts[:2], parts[2:4] if copies == 2 else parts[:2]]
        ranks = parts[2 * copies :]
        self.ranks = [x.view(torch.int32) for x in ranks[:2]]
        self.digit_counts = [x.view(torch.int32) for x in ranks[2:]]


def _check(
    write_idx: Tensor,
    read_idx: Tensor,
    start: int,
    length: int,
    doc_start: Tensor | None,
    entering: str,
    entering_slots: Tensor | None,
    leaving_slots: Tensor | None,
) -> None:
    batch, tokens, heads, _ = write_idx.shape
    for name, x in (("write_idx", write_idx), ("read_idx", read_idx)):
        _require(name, x, (batch, tokens, heads, x.shape[-1]))
    if not 0 <= start < start + length <= tokens:
        raise ValueError(f"hksa plan: tokens {start} to {start + length} are not a stretch of {tokens} tokens")
    if entering not in ("none", "dense", "sparse") or (entering == "sparse") != (entering_slots is not None):
        raise ValueError(
            f"hksa plan: entering={entering!r} with entering_slots {'absent' if entering_slots is None else 'given'}; "
            "expected none, dense, or sparse with entering_slots"
        )
    for name, rows in (("entering_slots", entering_slots), ("leaving_slots", leaving_slots)):
        if rows is not None:
            _require(name, rows, (batch * heads, rows.shape[-1]))
    if doc_start is not None and (tuple(doc_start.shape) != (batch, tokens) or not doc_start.is_contiguous()):
        raise ValueError(
            f"hksa plan: doc_start has shape {tuple(doc_start.shape)}, expected {(batch, tokens)}, contiguous"
        )


def _require(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape or x.dtype != torch.int32 or not x.is_contiguous():
        raise ValueError(
            f"hksa plan: {name} has shape {tuple(x.shape)} and dtype {x.dtype}, expected int32 {shape}, contiguous"
        )
