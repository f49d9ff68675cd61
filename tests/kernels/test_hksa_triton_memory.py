"""What HKSA's Triton kernels touch: all of their outputs, no memory but their own, nothing of the future."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.hksa_cases import DEVICE, STATE, Case, random_documents
from tests.kernels.hksa_grid import choose_stretch, dense_outputs, device_case, to_device, values
from tests.seeds import seed_afresh

GUARD = 64
"""Elements on either side of a guarded buffer, a multiple of 16 bytes: alignment is part of what is compiled."""

CALLS: dict[str, dict[str, Any]] = {
    "everything": {"documents": True, "inject": True},
    "stretches": {"documents": True, "stretch": 2, "activations": torch.bfloat16},
    "sparse": {"state": False, "num_slots": 5000, "stretch": 2, "surprise": False, "inject": True},
}
if DEVICE == "cuda":
    CALLS = {
        name: {"length": 300, "heads": 3, "writes": 5, "reads": 7, "num_slots": 64} | x for name, x in CALLS.items()
    }

Run = Callable[[], dict[str, Tensor]]


@pytest.fixture(params=list(CALLS.values()), ids=list(CALLS))
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, many_chains: None) -> tuple[Case, Run]:
    """A case, and running it: outputs and gradients."""
    seed_afresh()
    options = {"batch": 1, "heads": 2, "length": 4, "dim": 48, "reads": 3, **request.param}
    stretch = options.pop("stretch", None)
    case = device_case(**options)
    arguments = choose_stretch(case, stretch, monkeypatch)
    return case, lambda: values(case, "triton", **arguments)[0]


def assert_bitwise_equal(want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name], x), name


def filling(dtype: torch.dtype) -> float | int:
    """What no right result contains, and no right program survives as an index."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max // 2 if dtype != torch.bool else True


def guarded(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A buffer of this shape and the larger one that it lies in, both filled with `filling`."""
    memory = torch.full((shape.numel() + 2 * GUARD,), filling(dtype), dtype=dtype, device=device)
    return memory[GUARD : GUARD + shape.numel()].view(shape), memory


def is_intact(memory: Tensor) -> bool:
    bands = torch.cat([memory[:GUARD], memory[-GUARD:]])
    return bool((bands.isnan() if bands.is_floating_point() else bands == filling(bands.dtype)).all())


def test_two_runs_are_equal_bitwise(call: tuple[Case, Run]) -> None:
    _, run = call
    want = run()
    for _ in range(3 if DEVICE == "cuda" else 1):
        assert_bitwise_equal(want, run())


def test_buffers_are_filled_and_their_surroundings_left_alone(
    call: tuple[Case, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs, outputs and workspaces lie between bands of NaN (of huge numbers, where integers), and begin as such."""
    case, run = call
    want = run()
    memories = []

    def surrounded(x: Tensor) -> Tensor:
        buffer, memory = guarded(x.shape, x.dtype, x.device)
        memories.append(memory)
        return buffer.copy_(x)

    case.tensors.update({name: surrounded(x) for name, x in case.tensors.items()})
    inputs = len(memories)

    def empty(*size: Any, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        buffer, memory = guarded(shape, dtype, device)
        memories.append(memory)
        return buffer

    def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    def zeros_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return empty_like(x, dtype).zero_()

    with monkeypatch.context() as patch:
        # The leaves of `values` are the guarded inputs themselves.
        patch.setattr(Tensor, "clone", lambda x: x)
        for replacement in (empty, empty_like, zeros_like):
            patch.setattr(torch, replacement.__name__, replacement)
        got = run()
    assert len(memories) > inputs + 30
    assert all(is_intact(memory) for memory in memories)
    assert_bitwise_equal(want, got)


def test_no_memory_is_read_that_was_not_written(call: tuple[Case, Run]) -> None:
    """In deterministic mode torch fills what torch.empty returns with NaN, and refuses ops that are not repeatable."""
    _, run = call
    want = run()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        got = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_bitwise_equal(want, got)


def test_inputs_and_gradients_need_not_be_contiguous(many_chains: None) -> None:
    seed_afresh()
    case = device_case(batch=2, heads=2, length=3, documents=True, inject=True)
    assert case.doc_start is not None

    def strided(x: Tensor) -> Tensor:
        """The same values, with the first two dimensions exchanged in memory and a gap after every element."""
        if x.ndim == 1:
            return x.repeat_interleave(2)[::2]
        wide = torch.full((*x.transpose(0, 1).shape, 2), filling(x.dtype), dtype=x.dtype, device=DEVICE)
        return wide[..., 0].copy_(x.transpose(0, 1)).transpose(0, 1)

    def gradients(case: Case, layout: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
        outputs = dense_outputs(case.with_tensors(**leaves), "triton")
        generator = torch.Generator().manual_seed(5)
        weights = [layout(torch.randn(x.shape, generator=generator).to(DEVICE)) for x in outputs.values()]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
        return outputs | {f"d_{name}": x for name, x in zip(leaves, found, strict=True)}

    other = Case({name: strided(x) for name, x in case.tensors.items()}, case.num_slots, strided(case.doc_start))
    assert not any(x.is_contiguous() for x in (*other.tensors.values(), other.doc_start) if x is not None)
    assert_bitwise_equal(gradients(case, lambda x: x), gradients(other, strided))


@pytest.mark.parametrize("number", range(16 if DEVICE == "cuda" else 2))
def test_the_future_changes_nothing_in_the_past_bitwise(
    number: int, monkeypatch: pytest.MonkeyPatch, many_chains: None
) -> None:
    seed_afresh()
    length = int(torch.randint(2, 200 if DEVICE == "cuda" else 8, ()))
    sizes = {"batch": 1, "length": length, "dim": (32, 48)[number % 2], "documents": number % 2 == 0}
    sizes |= {"inject": number // 2 % 2 == 0, "num_slots": (9, 200)[number // 4 % 2]}
    case, other = (
        case.with_tensors(read_idx=case.tensors["write_idx"][..., :2].clone())  # so that every read finds something
        for case in (device_case(**sizes), device_case(**sizes))
    )
    now = int(torch.randint(1, length, ()))
    mixed = {
        name: torch.cat([x[:, :now], other.tensors[name][:, now:]], 1) if x.ndim > 1 and name not in STATE else x
        for name, x in case.tensors.items()
    }
    doc_start = None
    if case.doc_start is not None:
        later = random_documents(1, length - now).to(DEVICE)
        doc_start = torch.cat([case.doc_start[:, :now], torch.where(later >= 0, later + now, -9)], 1).cummax(1).values
    arguments = choose_stretch(case, 5 if number % 3 == 0 else None, monkeypatch)
    o, _ = case.call("triton", **arguments)
    changed, _ = Case(mixed, case.num_slots, doc_start).call("triton", **arguments)
    assert torch.equal(o[:, :now], changed[:, :now])
    assert not torch.equal(o[:, now:], changed[:, now:])


@pytest.mark.parametrize("inject", [False, True], ids=["", "inject"])
def test_packed_documents_equal_the_documents_alone(inject: bool, many_chains: None) -> None:
    """Documents that began before the call, at its first token, of one token, and up to its last token."""
    seed_afresh()
    rows = [[-4, 5, 6], [0], [-1]] if DEVICE == "cpu" else [[-4, 5, 6, 11], [0, 12], [-1], [0, 1, 2, 3]]
    length = 8 if DEVICE == "cpu" else 13
    doc_start = torch.tensor([[max(s for s in starts if s <= t) for t in range(length)] for starts in rows])
    case = device_case(batch=len(rows), heads=1, length=length, dim=32, inject=inject)
    o, leaving = to_device(Case(case.tensors, case.num_slots, doc_start)).call("triton")
    for b, starts in enumerate(rows):
        row = case.row(b)
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            document = row.span(max(start, 0), stop)
            if start >= 0:
                document = document.without(*STATE)
            alone = dense_outputs(document, "triton")
            # Not bitwise: how many chains share a program depends on the call's length, and sums over d on that.
            torch.testing.assert_close(o[b : b + 1, max(start, 0) : stop], alone["o"], rtol=1e-5, atol=1e-5)
        for name in STATE:
            torch.testing.assert_close(getattr(leaving, name)[b : b + 1], alone[name], rtol=1e-5, atol=1e-5)
