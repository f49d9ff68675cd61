"""Handing the memory from layer to layer (hksa.md section 4)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba.models.threading import SurpriseGate
from slotmamba_kernels import SlotState, hksa_threaded
from tests.models.model_cases import SEGMENT, HKSACalls, decoder_only, document_starts, tokens
from tests.seeds import seed_afresh


def random_memory(*, heads: int = 2, slots: int = 6, dim: int = 4) -> SlotState:
    shape = (3, heads, slots)
    return SlotState(
        torch.randn(*shape, dim), torch.randn(*shape, dim), torch.rand(shape) + 0.1, torch.randn(shape).exp()
    )


@torch.no_grad()
def test_mixes_by_the_layers_own_surprise() -> None:
    """The formula, number by number."""
    seed_afresh()
    gate, own, below = SurpriseGate(2), random_memory(), random_memory()
    own.surprise[0, 0, 0] = 0
    gate.bias.normal_()
    gate.slope.normal_()
    mixed = gate(own, below)
    for b in range(3):
        for h in range(2):
            for i in range(6):
                surprise = float(own.surprise[b, h, i])
                exponent = float(gate.bias[h]) + float(gate.slope[h]) * math.log(surprise + 1e-6)
                g = 1 / (1 + math.exp(-exponent))
                for name in ("S_k", "S_v", "z", "surprise"):
                    mine, other = getattr(own, name)[b, h, i], getattr(below, name)[b, h, i]
                    torch.testing.assert_close(getattr(mixed, name)[b, h, i], g * mine + (1 - g) * other)


def test_starts_with_nine_tenths_of_its_own() -> None:
    own, below = random_memory(), random_memory()
    mixed = SurpriseGate(2)(own, below)
    for name in ("S_k", "S_v", "z", "surprise"):
        torch.testing.assert_close(getattr(mixed, name), 0.9 * getattr(own, name) + 0.1 * getattr(below, name))


@torch.no_grad()
def test_bound_survives_the_mix() -> None:
    """Whatever multiple of z bounds |S| in both memories bounds it in their mix."""
    seed_afresh()
    gate = SurpriseGate(2)
    gate.bias.normal_(std=3)
    gate.slope.normal_()
    own, below = random_memory(), random_memory()
    for memory in (own, below):
        for x in (memory.S_k, memory.S_v):
            x.copy_(memory.z.unsqueeze(-1) * F.normalize(x, dim=-1))
    mixed = gate(own, below)
    for memory in (mixed.S_k, mixed.S_v):
        assert bool((memory.norm(dim=-1) <= mixed.z * (1 + 1e-5)).all())


def test_gradient_reaches_both_memories_and_the_gate() -> None:
    seed_afresh()
    gate = SurpriseGate(2)
    memories = [random_memory(), random_memory()]
    leaves = [x.requires_grad_() for memory in memories for x in vars(memory).values()]
    mixed = gate(*memories)
    loss = sum((x * torch.randn_like(x)).sum() for x in vars(mixed).values())
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, [*leaves, gate.bias, gate.slope])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def assert_same(a: SlotState, b: SlotState) -> None:
    a, b = a.dense(), b.dense()
    for name in vars(a):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_segments_start_from_the_ends_of_the_segment_before(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Layer 0 from its own memory, layer l from its own and layer l-1's, both at the end of the segment before. The
    first starts from none, and what the last leaves nobody wants."""
    seed_afresh()
    model, calls = decoder_only(), HKSACalls(monkeypatch)
    doc_start = document_starts([[0, 3, SEGMENT, 3 * SEGMENT + 1], [0, 8]], 4 * SEGMENT) if packed else None
    model(tokens(2, 4 * SEGMENT), doc_start=doc_start)
    assert len(calls.inputs) == 3 * 4
    for layer in range(3):
        entered = [inputs["state"] for inputs in calls.inputs[4 * layer : 4 * layer + 4]]
        left = calls.leaving[4 * layer : 4 * layer + 4]
        assert entered[0] is None and left[-1] is None
        for segment in range(1, 4):
            expected = left[segment - 1]
            if layer > 0:
                below = calls.leaving[4 * (layer - 1) + segment - 1]
                expected = model.decoder.layers[layer].slots.surprise_gate(expected, below)
            assert_same(entered[segment], expected)


@torch.no_grad()
def test_without_threading_the_memory_runs_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing computes the surprise or leaves a memory, which nothing would look at."""
    model, calls = decoder_only(slots={"thread_layers": False}), HKSACalls(monkeypatch)
    model(tokens(2, 3 * SEGMENT))
    assert len(calls.inputs) == 3
    assert all(inputs["surprise"] is None for inputs in calls.inputs) and calls.leaving == [None] * 3
    assert not any("surprise" in name for name, _ in model.named_parameters())


def test_only_upper_layers_have_a_gate() -> None:
    gates = [layer.slots.surprise_gate for layer in decoder_only().decoder.layers]
    assert gates[0] is None and all(isinstance(gate, SurpriseGate) for gate in gates[1:])
    (single,) = decoder_only(decoder_layers=1).decoder.layers
    assert single.slots.surprise_gate is None and single.slots.surprise_mix is None


@pytest.mark.parametrize("chunks", [1, 2])
def test_segments_at_once_train_as_one_by_one(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """The Triton backend's kernels for all segments, with documents and a shorter last segment, against the torch
    backend: losses and the gradients of all weights. The seed is fixed: two slots may weigh the same to within
    rounding."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = decoder_only().to(device)
    model.decoder.sequence_chunks = chunks
    batch = {"input_ids": tokens(2, 5 * SEGMENT - 2), "labels": tokens(2, 5 * SEGMENT - 2)}
    batch["doc_start"] = document_starts([[0, SEGMENT + 1, 4 * SEGMENT], [0]], 5 * SEGMENT - 2)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr("slotmamba.models.slot_memory.hksa_threaded", partial(hksa_threaded, backend=backend))
        model.zero_grad()
        losses = model.losses(**{name: x.to(device) for name, x in batch.items()})
        (losses.nll.mean() + losses.balance).backward()
        gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        results.append((losses.nll.detach(), gradients))
    (want, expected), (got, gradients) = results
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, x in gradients.items():
        difference = float((x - expected[name]).norm())
        assert difference <= 1e-4 * max(float(expected[name].norm()), 1e-3), f"{name}: off by {difference:.1e}"
