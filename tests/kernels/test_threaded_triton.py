"""A layer's memory over all segments at once, against the definition, segment by segment, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba_kernels import SegmentEnds, SlotState, hksa_threaded
from slotmamba_kernels.threading import threaded_op
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.kernels.hksa_cases import DEVICE, STATE, Case, random_case, random_documents
from tests.kernels.hksa_grid import ACTIVATIONS, assert_near, pairwise, to_device, values
from tests.kernels.test_hksa_triton_memory import assert_bitwise_equal
from tests.seeds import seed_afresh

BELOW = ("below_k", "below_v", "below_z", "below_surprise")

FEATURES: dict[str, tuple[Any, ...]] = {
    "activations": (torch.float32, torch.bfloat16),
    "documents": (False, True),
    "state": (True, False),
    "gated": (True, False),
    "same_slots": (False, True),
}
SIZES: dict[str, tuple[int, ...]] = {
    "steps": (2, 1, 3),
    "writes": (3, 1, 4),
    "reads": (2, 1, 6),
    "dim": (32, 48),
    "num_slots": (9, 6, 17),
    "segment_len": (3, 1, 4),
    "segments": (3, 2, 4),
    "rest": (0, 1),
    "heads": (2, 1),
    "batch": (2, 1),
}
if DEVICE == "cuda":
    SIZES |= {
        "steps": (2, 1, 3, 4),
        "writes": (8, 1, 5, 32),
        "reads": (8, 2, 7, 32),
        "dim": (128, 32, 96, 256),
        "num_slots": (64, 37, 1024),
        "segment_len": (32, 1, 17, 64),
        "segments": (8, 2, 3),
        "heads": (8, 1, 3),
        "batch": (2, 1, 4),
    }
GRID = pairwise(SIZES | FEATURES)


@dataclass(frozen=True)
class Threaded(Case):
    """A call of hksa_threaded: with a gate its tensors have `bias`, `slope` and BELOW, [B, N, H, M(, d)] each."""

    segment_len: int = 0

    def call(self, backend: str = "torch", **options: Any) -> tuple[Tensor, SlotState]:
        tensors: dict[str, Any] = dict(self.tensors)
        state, below, gate, surprise = (
            tuple(tensors.pop(name) for name in names if name in self.tensors)
            for names in (STATE, BELOW, ("bias", "slope"), ("a_s", "eta"))
        )
        o, ends = hksa_threaded(
            **tensors, num_slots=self.num_slots, segment_len=self.segment_len, doc_start=self.doc_start,
            surprise=surprise or None, state=SlotState(*state) if state else None, gate=gate or None,
            below=SegmentEnds(stacked=SlotState(*below)) if below else None, backend=backend, **options,
        )  # fmt: skip
        return o, ends.stacked(len(ends))


def threaded_case(
    *,
    activations: torch.dtype = torch.float32,
    segment_len: int = 3,
    segments: int = 3,
    rest: int = 0,
    gated: bool = True,
    documents: bool = False,
    **options: Any,
) -> Threaded:
    """rest: whether a segment of half the length follows the others."""
    length = segments * segment_len + rest * -(-segment_len // 2)
    case = random_case(length=length, dtype=torch.float32, **options)
    tensors = {name: x.to(activations) if name in ACTIVATIONS else x for name, x in case.tensors.items()}
    # S/z of the size that writes leave, here and below: in half precision larger ones cost digits of what is read.
    tensors |= {name: tensors[name] * tensors["z"][..., None] for name in ("S_k", "S_v") if name in tensors}
    batch, _, heads, dim = tensors["q"].shape
    if gated:
        scores = (batch, segments + rest, heads, case.num_slots)
        z = torch.rand(scores) + 0.1
        below = (*(torch.randn(*scores, dim) * z[..., None] for _ in range(2)), z, torch.rand(scores))
        tensors |= dict(zip(BELOW, below, strict=True)) | {"bias": torch.randn(heads), "slope": torch.randn(heads) / 4}
    doc_start = random_documents(batch, length) if documents else None
    moved = to_device(Case(tensors, case.num_slots, doc_start))
    return Threaded(moved.tensors, moved.num_slots, moved.doc_start, segment_len)


@pytest.mark.parametrize("number", range(len(GRID)))
def test_every_pair_of_features_and_sizes(number: int) -> None:
    seed_afresh()
    options = dict(GRID[number])
    print(options)
    case = threaded_case(**options)
    large = case.tensors["q"].numel() * case.num_slots > 2**26  # the definition copies the whole memory at every token
    assert_near(case, values(case, "triton")[0], "torch" if large else "reference")


def everything(**options: Any) -> Threaded:
    sizes = {"heads": 3, "writes": 5, "reads": 7, "num_slots": 64, "segment_len": 40} if DEVICE == "cuda" else {}
    return threaded_case(**{"batch": 2, "dim": 48, "documents": True, **sizes, **options})


def test_runs_at_once_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_afresh()
    ran = []
    run = threaded_op.threaded_triton

    def count(*arguments: Any, **options: Any) -> tuple[Tensor, SlotState]:
        ran.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(threaded_op, "threaded_triton", count)
    case = threaded_case(batch=1, heads=1, dim=32)
    case.call("triton")
    assert len(ran) == 1
    case.call("torch")
    replace(case, segment_len=5).call("triton")
    case.without("a_s", "eta").call("triton")
    threaded_case(batch=1, heads=1, dim=32, num_slots=1025).call("triton")
    assert len(ran) == 1


def test_two_runs_are_equal_bitwise() -> None:
    seed_afresh()
    case = everything(activations=torch.bfloat16)
    assert_bitwise_equal(values(case, "triton")[0], values(case, "triton")[0])


def test_buffers_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors begin as NaN, or as huge numbers where they hold integers."""
    seed_afresh()
    case = everything()
    want = values(case, "triton")[0]
    empty = torch.empty

    def filled(x: Tensor) -> Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **options: filled(empty(*size, **options)))
        patch.setattr(
            torch, "empty_like", lambda x, dtype=None: filled(empty(x.shape, dtype=dtype or x.dtype, device=x.device))
        )
        got = values(case, "triton")[0]
    assert_bitwise_equal(want, got)


def test_nothing_comes_from_the_future() -> None:
    """Other tokens and another layer below from a point on: what was read before stays the same bitwise."""
    seed_afresh()
    case = everything(segments=4, documents=False)
    o, ends = case.call("triton")
    at = 2 * case.segment_len
    other = {}
    for name, x in everything(segments=4, documents=False).tensors.items():
        mine = case.tensors[name]
        if name in BELOW:  # the second segment's end is seen from the third segment on
            other[name] = torch.cat([mine[:, :1], x[:, 1:]], 1)
        elif name in STATE or x.ndim == 1:
            other[name] = mine
        else:
            other[name] = torch.cat([mine[:, :at], x[:, at:]], 1)
    changed, ends_then = case.with_tensors(**other).call("triton")
    assert torch.equal(o[:, :at], changed[:, :at])
    assert torch.equal(ends.S_v[:, :2], ends_then.S_v[:, :2])
    assert not torch.equal(o[:, at:], changed[:, at:])


def test_opcheck() -> None:
    """Schemas, registrations, fake kernels against real ones, and tracing forward and backward."""
    seed_afresh()
    case = threaded_case(batch=1, heads=1, dim=32, steps=1, writes=2, segments=2, documents=True)
    named: dict[str, Any] = {
        **case.tensors, "doc_start": case.doc_start, "num_slots": case.num_slots, "segment_len": case.segment_len,
    }  # fmt: skip
    arguments = [named[name] for name in threaded_op.ARGUMENTS]
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(threaded_op.threaded_op, tuple(leaves))


def test_the_output_may_be_changed_in_place() -> None:
    case = threaded_case(batch=1, heads=1, dim=32)
    case.tensors["q"].requires_grad_()
    o, _ = case.call("triton")
    o *= 2
    o.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_does_not_fit_is_refused(backend: str) -> None:
    case = threaded_case(batch=1, heads=2)
    tensors = case.tensors
    with pytest.raises(ValueError, match=r"hksa_threaded: a gate needs .* ends of 2 segments, there are 0"):
        case.without(*BELOW).call(backend)
    with pytest.raises(ValueError, match=r"slope of the gate has shape \(1,\), expected \(2,\)"):
        case.with_tensors(slope=tensors["slope"][:1]).call(backend)
    fewer = {name: tensors[name][:, :, :, :8] for name in BELOW}
    with pytest.raises(ValueError, match=r"below has a memory of B, H, M, d = \(1, 2, 8, 4\)"):
        case.with_tensors(**fewer).call(backend)
    with pytest.raises(ValueError, match=r"below has a memory of .* in torch.bfloat16, torch.float32, expected"):
        case.with_tensors(below_z=tensors["below_z"].bfloat16()).call(backend)
    with pytest.raises(ValueError, match=r"segment_len=0, expected at least 1"):
        replace(case, segment_len=0).call(backend)
    longer = torch.cat([tensors["k"], tensors["k"]], 1)
    with pytest.raises(ValueError, match=r"hksa: k has shape \(1, 18, 2, 2, 4\), expected \(1, 9, 2, 2, 4\)"):
        case.with_tensors(k=longer).call(backend)
    with pytest.raises(ValueError, match=r"hksa: u_v has dtype torch.bfloat16, its counterpart .* torch.float32"):
        case.with_tensors(u_v=tensors["u_v"].bfloat16()).call(backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_document_starts_in_bytes(backend: str) -> None:
    """Their differences would not fit: 0 - 200 is 56 in uint8."""
    seed_afresh()
    case = threaded_case(batch=1, heads=1, segment_len=100, segments=3, state=False)
    case = replace(case, doc_start=torch.zeros(1, 300, dtype=torch.uint8, device=DEVICE))
    o, _ = case.call(backend)
    want, _ = replace(case, doc_start=None).call("torch")
    torch.testing.assert_close(o, want, rtol=0, atol=1e-5)


def call(activations: torch.dtype, depends_on_ends: bool, **options: Any) -> None:
    case = threaded_case(activations=activations, **{"batch": 1, "segments": 2, "num_slots": 64, **options})
    leaves = [x.requires_grad_() for x in case.tensors.values() if x.is_floating_point()]
    o, ends = case.call("triton")
    loss = o.sum() + (ends.S_k.sum() if depends_on_ends else 0.0)
    torch.autograd.grad(loss, leaves, allow_unused=True)


CALLS = {
    "in a model": partial(call, torch.bfloat16, True, dim=128, writes=8, reads=8, num_slots=1024, state=False),
    "least": partial(call, torch.float32, False, dim=32, steps=1, writes=1, reads=1, state=False, gated=False),
    "most": partial(call, torch.float16, True, dim=256, steps=4, writes=32, reads=32, documents=True),
    "odd": partial(call, torch.float32, True, dim=96, steps=3, writes=5, reads=7, documents=True, gated=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_ahead_of_time(architecture: int) -> None:
    kernels = compile_in_subprocess(architecture, "tests.kernels.test_threaded_triton:CALLS")
    assert {"threaded_backward", "threaded_forward"} <= set(kernels)
