"""Slot memories that hold only some slots: the state's own methods, and HKSA from and to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba_kernels import SlotState, hksa
from slotmamba_kernels.hksa.slot_lists import rows_of, trimmed, united
from slotmamba_kernels.hksa.state import SparseSlotState
from tests.kernels.hksa_cases import INJECT, STATE, SURPRISE, Case, assert_equal_to, random_case, weighted_sum
from tests.seeds import seed_afresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 40


def random_slots(batch: int, heads: int, rows: int) -> Tensor:
    """Lists that hold between none and `rows` slots."""
    slots = torch.full((batch, heads, rows), SLOTS, dtype=torch.int32)
    for stream in slots.view(-1, rows):
        held = int(torch.randint(0, min(rows, SLOTS) + 1, ()))
        stream[:held] = torch.randperm(SLOTS)[:held].sort().values
    return slots


def random_sparse_state(*, heads: int = 2, rows: int = 7, dim: int = 3) -> SparseSlotState:
    """Of two sequences. Rows that only fill it up hold NaN."""
    slots = random_slots(2, heads, rows)
    shape = slots.shape
    parts = [torch.randn(*shape, dim), torch.randn(*shape, dim), torch.rand(shape) + 0.1, torch.rand(shape)]
    for x in parts:
        x[slots == SLOTS] = torch.nan
    S_k, S_v, z, surprise = (x.to(DEVICE) for x in parts)
    return SparseSlotState(S_k, S_v, z, surprise, slots=slots.to(DEVICE), slots_in_all=SLOTS)


def leaf_state(state: SlotState) -> SlotState:
    return state.map(lambda x: x.detach().clone().requires_grad_())


def tensors(state: SlotState) -> list[Tensor]:
    return [getattr(state, name) for name in STATE]


# The state's own methods


def test_dense_has_every_slot() -> None:
    """And its gradient reaches the rows, none those that mean nothing."""
    seed_afresh()
    state = leaf_state(random_sparse_state())
    assert isinstance(state, SparseSlotState)
    dense = state.dense()
    assert dense.num_slots == state.num_slots == SLOTS and not isinstance(dense, SparseSlotState)
    upstream = [torch.randn_like(x) for x in tensors(dense)]
    gradients = torch.autograd.grad(tensors(dense), tensors(state), upstream)
    for name, empty, above, gradient in zip(STATE, (0.0, 0.0, 1 / SLOTS, 0.0), upstream, gradients, strict=True):
        for b in range(2):
            for h in range(2):
                row = {slot: r for r, slot in enumerate(state.slots[b, h].tolist()) if slot < SLOTS}
                for slot in range(SLOTS):
                    got = getattr(dense, name)[b, h, slot]
                    if slot in row:
                        assert torch.equal(got, getattr(state, name)[b, h, row[slot]])
                        assert torch.equal(gradient[b, h, row[slot]], above[b, h, slot])
                    else:
                        assert torch.equal(got, torch.full_like(got, empty))
                assert not gradient[b, h, len(row) :].any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_contents(dtype: torch.dtype, sparse: bool) -> None:
    """Values and gradients; slots that are not held are empty."""
    seed_afresh()
    state = random_sparse_state() if sparse else random_sparse_state().dense()
    state = leaf_state(state)
    index = torch.randint(SLOTS, (2, 9, 2, 3), dtype=dtype, device=DEVICE)
    dense = state.dense()
    streams = torch.arange(4, device=DEVICE).view(2, 1, 2, 1) * SLOTS
    want = torch.stack([(x / dense.z.unsqueeze(-1)).flatten(0, 2)[streams + index] for x in (dense.S_k, dense.S_v)])
    got = torch.stack(state.contents(index))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    upstream = torch.randn_like(got)
    for expected, gradient in zip(
        *(torch.autograd.grad(x, tensors(state)[:3], upstream) for x in (want, got)), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_map_keeps_the_slots() -> None:
    seed_afresh()
    state = random_sparse_state()
    doubled = state.map(lambda x: x.double())
    assert isinstance(doubled, SparseSlotState) and doubled.slots is state.slots and doubled.num_slots == SLOTS
    assert all(x.dtype == torch.float64 for x in tensors(doubled))


def test_lists_of_slots() -> None:
    seed_afresh()
    first, second = random_slots(2, 3, 30), random_slots(2, 3, 25)
    both = united(first, second, SLOTS)
    short = trimmed(both, SLOTS)
    wanted = torch.randint(SLOTS + 1, (2, 3, 50), dtype=torch.int32)
    rows = rows_of(first, wanted, SLOTS)
    assert both.shape == (2, 3, SLOTS) and short.shape[-1] <= SLOTS
    for b in range(2):
        for h in range(3):
            held = sorted({*first[b, h].tolist(), *second[b, h].tolist()} - {SLOTS})
            for found in (both[b, h].tolist(), short[b, h].tolist()):
                assert found == held + [SLOTS] * (len(found) - len(held))
            for slot, row in zip(wanted[b, h].tolist(), rows[b, h].tolist(), strict=True):
                there = slot < SLOTS and slot in first[b, h].tolist()
                assert int(first[b, h, row]) == slot if there else row == -1


# HKSA


def call(case: Case, backend: str, **options: Any) -> tuple[Tensor, SlotState | None]:
    """`state` among the options replaces the case's."""
    groups = {"surprise": SURPRISE, "inject": INJECT, "state": STATE}
    named = {name: x for name, x in case.tensors.items() if not any(name in group for group in groups.values())}
    arguments: dict[str, Any] = {
        "surprise": tuple(case.tensors[name] for name in SURPRISE) if "a_s" in case.tensors else None,
        "inject": tuple(case.tensors[name] for name in INJECT) if "c_k" in case.tensors else None,
        "state": case.state,
        **options,
    }
    return hksa(**named, num_slots=case.num_slots, doc_start=case.doc_start, backend=backend, **arguments)


def on_device(case: Case) -> Case:
    doc_start = None if case.doc_start is None else case.doc_start.to(DEVICE)
    return Case({name: x.to(DEVICE) for name, x in case.tensors.items()}, case.num_slots, doc_start)


LENGTH, WRITES = 9, 2


def small_case(**options: Any) -> Case:
    """Of two sequences, one head, d=3, without a state: the interpreter takes a while for each token and head."""
    sizes = {"heads": 1, "length": LENGTH, "dim": 3, "writes": WRITES, "steps": 1, "num_slots": SLOTS, **options}
    return on_device(random_case(**sizes, state=False, dtype=torch.float32))


def leaves_of(case: Case) -> tuple[Case, list[Tensor]]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    return case.with_tensors(**leaves), list(leaves.values())


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Triton backend: 40 slots are many, and recomputation runs stretches of 3 tokens of a small case."""
    from slotmamba_kernels.hksa import triton_op

    monkeypatch.setattr(triton_op, "DENSE_SLOTS", 16)
    monkeypatch.setattr(triton_op, "RECOMPUTED_BYTES", 300)


def two_calls(case: Case, state: SlotState | None, backend: str, **options: Any) -> tuple[dict[str, Tensor], SlotState]:
    """Outputs of two calls, the second from what the first left, and gradients of all inputs; then what was left."""
    case, leaves = leaves_of(case)
    if state is not None:
        state = leaf_state(state)
        leaves += tensors(state)
    first, between = call(case.span(0, 4), backend, state=state, **options)
    second, end = call(case.span(4, LENGTH), backend, state=between, **options)
    assert end is not None
    outputs = {"o": torch.cat([first, second], 1), **vars(end.dense())}
    gradients = torch.autograd.grad(weighted_sum(outputs), leaves)
    return outputs | {f"grad {i}": x for i, x in enumerate(gradients)}, end


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("inject", "enters", "recompute"),
    [(False, False, False), (False, True, True), (True, True, False), (True, False, True)],
)
def test_triton_with_sparse_memories_equals_torch(inject: bool, enters: bool, recompute: bool) -> None:
    """From none and from a sparse one, through two calls with documents, in one stretch each and in several."""
    seed_afresh()
    case = small_case(documents=True, inject=inject)
    state = random_sparse_state(heads=1) if enters else None
    got, end = two_calls(case, state, "triton", recompute=recompute)
    want, dense = two_calls(case, state, "torch")
    assert isinstance(end, SparseSlotState) and not isinstance(dense, SparseSlotState)
    assert end.slots.shape[-1] == 7 * enters + LENGTH * WRITES
    assert_equal_to(want, got, 2e-5, least=0.01)  # both are float32


@pytest.mark.usefixtures("small_limits")
def test_a_dense_memory_stays_dense() -> None:
    case = small_case()
    state = SlotState.initial(2, 1, SLOTS, 3, device=DEVICE)
    assert not isinstance(call(case, "triton", state=state)[1], SparseSlotState)
    assert isinstance(call(case, "triton")[1], SparseSlotState)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_torch_backends_take_sparse_memories(backend: str) -> None:
    seed_afresh()
    case, state = small_case(documents=True), random_sparse_state(heads=1)
    got, _ = two_calls(case, state, backend)
    want, _ = two_calls(case, state.dense(), backend)
    for name in ("o", *STATE):
        assert torch.equal(got[name], want[name])


def test_a_million_slots_cost_what_is_touched() -> None:
    """M = 4^10: as many rows as writes, and what M = 4^10 gives densely."""
    seed_afresh()
    slots = 4**10
    case = on_device(random_case(batch=1, length=7, heads=1, dim=2, dtype=torch.float32, state=False))
    spread = torch.randperm(slots, device=DEVICE)[:9].int()
    case = replace(case, num_slots=slots).with_tensors(
        write_idx=spread[case.tensors["write_idx"].long()], read_idx=spread[case.tensors["read_idx"].long()]
    )
    o, state = call(case, "triton")
    want, dense = call(case, "torch")
    assert isinstance(state, SparseSlotState) and state.S_k.shape == (1, 1, 7 * 3, 2) and dense is not None
    assert_equal_to({"o": want, **vars(dense)}, {"o": o, **vars(state.dense())}, 1e-5)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    ("backend", "entering", "recompute"),
    [
        ("reference", "none", True),
        ("torch", "none", False),
        ("torch", "sparse", True),
        ("triton", "none", False),
        ("triton", "sparse", True),
        ("triton", "dense", True),
    ],
)
def test_without_the_leaving_memory_the_output_is_the_same(entering: str, backend: str, recompute: bool) -> None:
    """Bitwise, and so are its gradients."""
    seed_afresh()
    sparse = random_sparse_state(heads=1)
    state: SlotState | None = {"none": None, "dense": sparse.dense(), "sparse": sparse}[entering]
    results = []
    case = small_case(documents=True, inject=True)
    for return_state in (True, False):
        calling, leaves = leaves_of(case)
        if state is not None:
            state = leaf_state(state)
            leaves += tensors(state)[:3]
        o, left = call(calling, backend, state=state, recompute=recompute, return_state=return_state)
        assert (left is not None) == return_state
        gradients = torch.autograd.grad(o.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append([o, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Arguments


def broken(state: SparseSlotState, what: str) -> SparseSlotState:
    slots = state.slots.clone()
    match what:
        case "descending":
            slots[0, 0, :2] = torch.tensor([5, 3], device=DEVICE)
        case "twice":
            slots[0, 0, :2] = 5
        case "negative":
            slots[1, 1, 0] = -1
        case "beyond":
            slots[1, 1, -1] = SLOTS + 1
        case "after filling":
            slots[0, 1, -2:] = torch.tensor([SLOTS, 7], device=DEVICE)
        case "int64":
            slots = slots.long()
        case "one head":
            slots = slots[:, :1]
        case "fewer slots":
            return replace(state, slots_in_all=SLOTS - 1)
        case "fewer rows":
            return replace(state, S_v=state.S_v[:, :, 1:])
        case "no rows":
            slots = slots[:, :, :0]
    return replace(state, slots=slots)


LISTS = ("descending", "twice", "negative", "beyond", "after filling")
WRONG = {
    "int64": r"state\.slots has shape \(2, 2, 7\) and dtype torch\.int64, expected int32 \(2, 2, R\)",
    "one head": r"state\.slots has shape \(2, 1, 7\)",
    "no rows": r"state\.slots has shape \(2, 2, 0\)",
    "fewer slots": "state is of 39 slots a head, expected num_slots=40",
    "fewer rows": r"state\.S_v has shape \(2, 2, 6, 3\), expected \(2, 2, 7, 3\)",
}
if DEVICE == "cpu":  # on a GPU nobody looks at the values
    WRONG |= {what: "state.slots is not a list of distinct slots in ascending order" for what in LISTS}


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("what", WRONG)
def test_sparse_memories_that_do_not_fit_are_refused(what: str, backend: str) -> None:
    seed_afresh()
    with pytest.raises(ValueError, match=f"^hksa: {WRONG[what]}"):
        call(small_case(heads=2), backend, state=broken(random_sparse_state(), what))
