"""The event plan of the Triton backend against the plain one, and what it promises besides its values."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from slotmamba_kernels.hksa import event_plan
from slotmamba_kernels.hksa.event_plan import EventPlan, bucket_shift, make_event_plan
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.kernels.event_plan_by_hand import streams_by_hand
from tests.seeds import seed_afresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64
KERNELS = ["link_kernel", "rank_kernel", "scan_kernel", "scatter_kernel"]


def draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def distinct_slots(rows: int, count: int, num_slots: int, skew: str) -> torch.Tensor:
    """[rows, count] int32 in random order: "uniform", "zipf" (slot m with weight 1/(m+1)) or the "same" in all rows."""
    if skew == "same":
        return torch.randperm(num_slots)[:count].int().expand(rows, count)
    if skew == "zipf":
        return (1 / torch.arange(1, num_slots + 1)).expand(rows, -1).multinomial(count).int()
    # Sorted numbers with repetition, pulled apart: distinct, and quick where num_slots is large.
    slots = torch.randint(num_slots - count + 1, (rows, count)).sort(1).values + torch.arange(count)
    return slots.gather(1, torch.rand(rows, count).argsort(1)).int()


def random_documents(batch: int, tokens: int) -> torch.Tensor:
    """[B, T] int64 doc_start; the first document of about half of the rows began before the call."""
    starts = torch.rand(batch, tokens) < 0.15
    first = torch.where(starts, torch.arange(tokens), -1).cummax(1).values
    return torch.where(first < 0, -torch.randint(1, 9, (batch, 1)), first)


def some_slots(streams: int, rows: int, num_slots: int, slots: torch.Tensor) -> torch.Tensor:
    """[S, rows] int32, ascending, filled up with num_slots: about half of `slots` [S, any], and others."""
    out = torch.full((streams, rows), num_slots, dtype=torch.int32)
    for stream in range(streams):
        known = slots[stream][torch.rand(slots.shape[1]) < 0.5].tolist()
        chosen = sorted({*known[: rows - 1], draw(0, num_slots - 1)})
        out[stream, : len(chosen)] = torch.tensor(chosen)
    return out


def random_call(
    batch: int = 2,
    tokens: int = 13,
    heads: int = 2,
    writes: int = 3,
    reads: int = 2,
    num_slots: int = 9,
    skew: str = "uniform",
    documents: bool = False,
    stretch: tuple[int, int] | None = None,
    entering: str = "dense",
    leaving: str = "dense",
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of `make_event_plan`."""
    rows = batch * tokens * heads
    write_idx, read_idx = (
        distinct_slots(rows, k, num_slots, skew).reshape(batch, tokens, heads, k).contiguous() for k in (writes, reads)
    )
    both = torch.cat([write_idx, read_idx], -1).transpose(1, 2).reshape(batch * heads, -1)
    options: dict[str, Any] = {"entering": entering}
    if documents:
        options["doc_start"] = random_documents(batch, tokens)
    if stretch is not None:
        options |= {"start": stretch[0], "length": stretch[1]}
    if entering == "sparse":
        options["entering_slots"] = some_slots(batch * heads, draw(1, 40), num_slots, both)
    if leaving == "sparse":
        options["leaving_slots"] = some_slots(batch * heads, draw(1, 40), num_slots, both)
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return [write_idx.to(DEVICE), read_idx.to(DEVICE), num_slots], options


def assert_right(plan: EventPlan, call: tuple[list[Any], dict[str, Any]]) -> None:
    (write_idx, read_idx, num_slots), options = call
    batch, _, heads, _ = write_idx.shape
    shift = bucket_shift(num_slots, plan.write_order.shape[1])
    assert plan.num_buckets == ((num_slots - 1) >> shift) + 1
    for name, x in vars(plan).items():
        assert x.dtype == torch.int32 and x.is_contiguous() and x.device == write_idx.device, name
    for stream, want in enumerate(streams_by_hand(write_idx, read_idx, num_slots, **options)):
        for name in ("write_order", "previous", "leaving", "read_order"):
            assert getattr(plan, name)[stream].tolist() == list(getattr(want, name)), name
        for name in ("write_source", "read_source"):
            got = getattr(plan, name).view(batch, -1, heads, getattr(plan, name).shape[-1])
            assert got[stream // heads, :, stream % heads].tolist() == getattr(want, name).tolist(), name
        for (begin, end), readers in zip(plan.read_range[stream].tolist(), want.readers, strict=True):
            assert list(range(begin, end)) == readers
        for idx, order, bucket in (
            (write_idx, plan.write_order, plan.write_bucket),
            (read_idx, plan.read_order, plan.read_bucket),
        ):
            start = options.get("start", 0)
            slots = idx[stream // heads, start:, stream % heads].flatten()[order[stream].long()]
            edges = torch.arange(plan.num_buckets + 1, device=DEVICE) << shift
            assert bucket[stream].tolist() == torch.searchsorted(slots.long(), edges).tolist()


SHAPES: dict[str, dict[str, Any]] = {
    "one of everything": {"batch": 1, "tokens": 1, "heads": 1, "writes": 1, "reads": 1, "num_slots": 1},
    "one slot": {"writes": 1, "reads": 1, "num_slots": 1, "tokens": 70},
    "all slots": {"writes": 9, "reads": 9, "num_slots": 9, "tokens": 40},
    "more written than read": {"writes": 32, "reads": 1, "num_slots": 1000},
    "more read than written": {"writes": 1, "reads": 32, "num_slots": 1000},
    "1000 slots": {"num_slots": 1000, "tokens": 129, "heads": 1},
    "4096 slots": {"num_slots": 4096, "tokens": 101, "heads": 1},
    "4^10 slots": {"num_slots": 4**10, "tokens": 67, "heads": 1, "writes": 8, "reads": 8},
    "three passes": {"num_slots": 2**21 + 5, "tokens": 33, "batch": 1},
    "several blocks": {"num_slots": 37, "tokens": 350, "heads": 1, "batch": 1, "reads": 5},
    "the same slots through time": {"skew": "same", "tokens": 90, "num_slots": 1000},
    "few slots most of the time": {"skew": "zipf", "tokens": 90, "num_slots": 256, "writes": 8, "reads": 8, "heads": 1},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_plan_at_many_shapes(options: dict[str, Any], documents: bool) -> None:
    seed_afresh()
    call = random_call(**options, documents=documents)
    assert_right(make_event_plan(*call[0], **call[1]), call)


@pytest.mark.parametrize("entering", ["none", "dense", "sparse"])
@pytest.mark.parametrize("leaving", ["dense", "sparse"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("stretch", [None, (0, 4), (5, 1), (6, 17)])
def test_plan_with_every_option(entering: str, leaving: str, documents: bool, stretch: tuple[int, int] | None) -> None:
    seed_afresh()
    call = random_call(
        tokens=23, num_slots=draw(4, 40), entering=entering, leaving=leaving, documents=documents, stretch=stretch
    )
    assert_right(make_event_plan(*call[0], **call[1]), call)


@pytest.mark.parametrize("number", range(12))
def test_plan_at_random(number: int) -> None:
    seed_afresh()
    tokens, num_slots = draw(1, 60), (9, 40, 1000, 4096, 4**10)[draw(0, 4)]
    start = draw(0, tokens - 1)
    call = random_call(
        batch=draw(1, 2), tokens=tokens, heads=draw(1, 3), writes=draw(1, 8), reads=draw(1, 8), num_slots=num_slots,
        skew=("uniform", "same")[draw(0, 1)], documents=bool(draw(0, 1)), stretch=(start, draw(1, tokens - start)),
        entering=("none", "dense", "sparse")[draw(0, 2)], leaving=("dense", "sparse")[draw(0, 1)],
    )  # fmt: skip
    assert_right(make_event_plan(*call[0], **call[1]), call)


def test_plan_of_more_blocks_than_are_scanned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_afresh()
    monkeypatch.setattr(event_plan, "SCAN_ROWS", 2)
    call = random_call(batch=1, heads=2, tokens=421, num_slots=21, writes=7, reads=3, documents=True)
    assert_right(make_event_plan(*call[0], **call[1]), call)


def test_plan_is_repeatable_and_stays_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty returns is filled with a number that the plan must neither read nor, around it, overwrite."""
    seed_afresh()
    call = random_call(num_slots=4**10, tokens=41, documents=True, entering="sparse", leaving="sparse")
    want = make_event_plan(*call[0], **call[1])
    for filling in (0, -1, 2**30 + 12345):
        memory: list[torch.Tensor] = []

        def guarded(shape: Any, filling: int = filling, memory: list[torch.Tensor] = memory, **options: Any) -> Any:
            size = torch.Size([shape] if isinstance(shape, int) else shape)
            memory.append(torch.full((size.numel() + 2 * GUARD,), filling, **options))
            return memory[-1][GUARD:-GUARD].view(size)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", guarded)
            got = make_event_plan(*call[0], **call[1])
        assert len(memory) == 10
        assert all((x[:GUARD] == filling).all() and (x[-GUARD:] == filling).all() for x in memory)
        assert all(torch.equal(x, y) for x, y in zip(got.tensors(), want.tensors(), strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA: too large for the interpreter")
@pytest.mark.parametrize("skew", ["uniform", "zipf", "same"])
@pytest.mark.parametrize("num_slots", [256, 1024, 4**10])
def test_plan_at_training_sizes(num_slots: int, skew: str) -> None:
    seed_afresh()
    if skew == "zipf" and num_slots == 4**10:
        num_slots = 4**8
    call = random_call(
        batch=2, tokens=4096, heads=2, writes=8, reads=8, num_slots=num_slots, skew=skew, documents=skew == "uniform"
    )
    assert_right(make_event_plan(*call[0], **call[1]), call)


def test_buckets_are_slots_or_hold_several_events() -> None:
    assert (bucket_shift(1024, 32768), bucket_shift(1024, 1024), bucket_shift(1024, 1)) == (0, 4, 10)
    assert (bucket_shift(4**10, 262144), bucket_shift(4**10, 512), bucket_shift(1, 512)) == (10, 15, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 13}, "not a stretch"),
        ({"start": -1}, "not a stretch"),
        ({"length": 14}, "not a stretch"),
        ({"length": 0}, "not a stretch"),
        ({"entering": "sparse"}, "entering_slots absent"),
        ({"entering": "all"}, "expected none, dense, or sparse"),
        ({"entering_slots": torch.zeros(4, 3, dtype=torch.int32)}, "entering_slots given"),
        ({"leaving_slots": torch.zeros(4, 3)}, "leaving_slots has shape"),
        ({"doc_start": torch.zeros(2, 12)}, "doc_start has shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    call = random_call()
    with pytest.raises(ValueError, match=message):
        make_event_plan(*call[0], **call[1] | change)
    with pytest.raises(ValueError, match=r"write_idx has shape .* and dtype torch.int64"):
        make_event_plan(call[0][0].long(), *call[0][1:])


def _compiled(**options: Any) -> EventPlan:
    torch.manual_seed(0)
    call = random_call(**options)
    return make_event_plan(*call[0], **call[1])


CALLS = {
    "plain": partial(_compiled, writes=8, reads=8, num_slots=1024, tokens=64, entering="none"),
    "everything": partial(
        _compiled, num_slots=4**10, tokens=23, stretch=(3, 17), documents=True, entering="sparse", leaving="sparse"
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_ahead_of_time(architecture: int) -> None:
    assert compile_in_subprocess(architecture, "tests.kernels.test_event_plan:CALLS") == KERNELS
