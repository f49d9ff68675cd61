"""HKSA with `recompute`: the same values from less that is kept."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba_kernels import SlotState, hksa
from slotmamba_kernels.hksa import eager, vectorized
from slotmamba_kernels.hksa.plan import Plan, make_plan
from tests.kernels.hksa_cases import INJECT, STATE, SURPRISE, Case, assert_equal_to, random_case, weighted_sum
from tests.seeds import seed_afresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def call(case: Case, backend: str, *, recompute: bool) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {name: x.to(DEVICE) for name, x in case.tensors.items()}
    state = SlotState(*(tensors.pop(name) for name in STATE)) if "z" in tensors else None
    surprise = tuple(tensors.pop(name) for name in SURPRISE) if "eta" in tensors else None
    inject = tuple(tensors.pop(name) for name in INJECT) if "c_k" in tensors else None
    o, leaving = hksa(
        **tensors, num_slots=case.num_slots, state=state, surprise=surprise, inject=inject, backend=backend,
        doc_start=None if case.doc_start is None else case.doc_start.to(DEVICE), recompute=recompute,
    )  # fmt: skip
    assert leaving is not None
    return {"o": o, **vars(leaving)}


def outputs_and_gradients(case: Case, backend: str, *, recompute: bool) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    outputs = call(case.with_tensors(**leaves), backend, recompute=recompute)
    gradients = torch.autograd.grad(weighted_sum(outputs), list(leaves.values()))
    return outputs | {f"grad {name}": x for name, x in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("options", [{}, {"inject": True}, {"state": False, "surprise": False}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_outputs_and_gradients_are_the_same(backend: str, options: dict[str, Any], documents: bool) -> None:
    """On a CPU outputs bitwise (a GPU's matrix products round by their sizes); gradients, which add up over stretches,
    to rounding."""
    seed_afresh()
    case = random_case(length=33, documents=documents, **options)
    assert 1 < 33 / eager._stretch_length(33, 9, 3) < 5
    want = outputs_and_gradients(case, backend, recompute=False)
    got = outputs_and_gradients(case, backend, recompute=True)
    assert_equal_to(want, got, 1e-12)
    for name in ("o", *STATE):
        assert DEVICE == "cuda" or torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [1, 2])
def test_few_tokens(backend: str, length: int) -> None:
    seed_afresh()
    case = random_case(length=length, documents=True)
    want = outputs_and_gradients(case, backend, recompute=False)
    assert_equal_to(want, outputs_and_gradients(case, backend, recompute=True), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_half_precision_inputs_under_autocast(backend: str) -> None:
    seed_afresh()
    case = random_case(length=33, dtype=torch.float32, inject=True)
    rough = {name: case.tensors[name].bfloat16() for name in ("q", "k", "u_k", "u_v", "c_k", "c_v")}
    case = case.with_tensors(**rough)
    with torch.autocast(DEVICE, torch.bfloat16):
        want = outputs_and_gradients(case, backend, recompute=False)
        got = outputs_and_gradients(case, backend, recompute=True)
    assert got["o"].dtype == torch.bfloat16 and torch.equal(got["o"], want["o"])
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=1e-3)


def test_short_stretches_where_the_memory_is_small() -> None:
    """What is kept, M states a boundary, and what is recomputed at a time, K states a token, are about the same."""
    for length, num_slots, writes in ((4096, 1024, 8), (100, 9, 3), (10**6, 1024, 4)):
        size = eager._stretch_length(length, num_slots, writes)
        assert 0.8 < (length / size * num_slots) / (size * writes) < 1.25
    assert eager._stretch_length(100, 4**10, 8) == 100


def kept_bytes(case: Case, backend: str, *, recompute: bool) -> int:
    """Of all tensors that autograd keeps for the backward pass, inputs among them, those that share memory once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)  # so that no two of them are at the same place
        return x

    alive: list[Tensor] = []
    leaves = {name: x.detach().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call(case.with_tensors(**leaves), backend, recompute=recompute)
    return sum(kept.values())


@pytest.mark.parametrize(("backend", "share"), [("reference", 0.02), ("torch", 0.1)])
def test_less_is_kept(backend: str, share: float) -> None:
    """Beside the inputs, a memory at each of 11 boundaries, against all that happens to the slots."""
    case = random_case(length=300, writes=8, num_slots=16, dim=16, inject=True)
    inputs = sum(x.nbytes for x in case.tensors.values())
    memory = sum(case.tensors[name].nbytes for name in STATE)
    kept, all_kept = (kept_bytes(case, backend, recompute=recompute) for recompute in (True, False))
    boundaries = -(-300 // eager._stretch_length(300, 16, 8)) - 1
    # What else is kept: document starts, and the o of the last stretch.
    assert inputs <= kept <= 1.02 * (inputs + boundaries * memory)
    assert kept - inputs < share * (all_kept - inputs)


def test_no_plan_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors, held by an autograd function itself, would be kept where the hooks above do not see them."""
    plans: list[weakref.ref[Plan]] = []

    def planned(*arguments: Any) -> Plan:
        plan = make_plan(*arguments)
        plans.append(weakref.ref(plan))
        return plan

    monkeypatch.setattr(vectorized, "make_plan", planned)
    case = random_case(length=33)
    for x in case.tensors.values():
        x.requires_grad_(x.is_floating_point())
    outputs = call(case, "torch", recompute=True)
    gc.collect()
    assert outputs["o"].requires_grad and len(plans) > 1 and not any(plan() for plan in plans)
