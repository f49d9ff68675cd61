"""Decoding that gives its states away (`consume`): what it gives, and what it leaves alone.

Seeds are fixed as in test_slotmamba_step.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq
from slotmamba.models.decoder import DecoderState
from slotmamba.sampling import generate
from slotmamba_kernels import hksa_step_
from tests.models.model_cases import LENGTH, OPTIONS, SEGMENT, decoder_only, seq2seq, tokens
from tests.models.test_slotmamba_step import step_through, tensors_of

BACKENDS = {"torch": OPTIONS, "triton": {name: OPTIONS[name] for name in ("threaded", "two steps")}}


def consume_through(
    model: SlotMambaForCausalLM | SlotMambaForSeq2Seq, input_ids: Tensor, state: DecoderState
) -> Tensor:
    """Logits [B, T, V]; the given state is kept, those after it are not."""
    logits = []
    for t, column in enumerate(input_ids.unbind(1)):
        step, state = model.step(column, state, consume=t > 0)
        logits.append(step)
    return torch.stack(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("backend", "changes"),
    [(backend, changes) for backend, options in BACKENDS.items() for changes in options.values()],
    ids=[f"{backend}, {name}" for backend, options in BACKENDS.items() for name in options],
)
def test_consumed_steps_equal_the_parallel_form(
    backend: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def step(*vectors: Tensor, **arguments: Any) -> Tensor:
        calls.append(1)
        return hksa_step_(*vectors, **arguments, backend=backend)

    monkeypatch.setattr("slotmamba.models.slot_memory.hksa_step_", step)
    torch.manual_seed(0)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    model = decoder_only(**changes).to(device)
    # In the interpreter a token takes long; past the end of a segment is enough there.
    batch, length = (2, LENGTH) if device == "cuda" or backend == "torch" else (1, SEGMENT + 2)
    input_ids = tokens(batch, length).to(device)
    logits = consume_through(model, input_ids, model.init_state(batch))
    torch.testing.assert_close(logits, model(input_ids), rtol=0, atol=1e-5)
    assert len(calls) == (length - 1) * len(model.decoder.layers)


@torch.no_grad()
def test_layers_with_injection_keep_copying() -> None:
    torch.manual_seed(0)
    model = seq2seq()  # the layer between the two that inject has no injection
    input_ids, encoder_ids = tokens(3, LENGTH), tokens(3, 9)
    logits = consume_through(model, input_ids, model.init_state(3, encoder_ids))
    torch.testing.assert_close(logits, model(input_ids, encoder_ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_memories_stay_where_they_are_within_a_segment() -> None:
    torch.manual_seed(0)
    model = decoder_only()
    _, state = step_through(model, tokens(2, SEGMENT + 1), model.init_state(2))
    _, state = model.step(tokens(2), state, consume=True)
    before = [layer.slots.memory.S_k.data_ptr() for layer in state.layers]
    _, state = model.step(tokens(2), state, consume=True)
    assert [layer.slots.memory.S_k.data_ptr() for layer in state.layers] == before


def test_with_gradients_a_consumed_state_is_not_overwritten() -> None:
    torch.manual_seed(0)
    model = decoder_only()
    _, state = step_through(model, tokens(2, 3), model.init_state(2))
    before = [tensor.clone() for tensor in tensors_of(state)]
    logits, _ = model.step(tokens(2), state, consume=True)
    logits.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))


@torch.no_grad()
def test_generation_keeps_the_state_that_it_starts_from() -> None:
    torch.manual_seed(0)
    model = decoder_only()
    _, state = step_through(model, tokens(2, SEGMENT - 1), model.init_state(2))
    before = [tensor.clone() for tensor in tensors_of(state)]
    prompt = tokens(2, 3)
    first = generate(model, state, prompt, LENGTH)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))
    assert torch.equal(generate(model, state, prompt, LENGTH), first)
