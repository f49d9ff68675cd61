"""Decoding token by token gives what the parallel form gives.

Seeds are fixed: two slots may weigh the same to within rounding, and the two forms round differently.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq
from slotmamba.models.decoder import DecoderState
from tests.models.model_cases import LENGTH, OPTIONS, SEGMENT, SEQ2SEQ_OPTIONS, decoder_only, seq2seq, tokens


def step_through(
    model: SlotMambaForCausalLM | SlotMambaForSeq2Seq, input_ids: Tensor, state: DecoderState
) -> tuple[Tensor, DecoderState]:
    """Logits [B, T, V] and the state after the last token."""
    logits = []
    for column in input_ids.unbind(1):
        step, state = model.step(column, state)
        logits.append(step)
    return torch.stack(logits, 1), state


def tensors_of(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, list):
        return [tensor for entry in state for tensor in tensors_of(entry)]
    if is_dataclass(state):
        return [tensor for field in fields(state) for tensor in tensors_of(getattr(state, field.name))]
    return []


@torch.no_grad()
@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())
def test_steps_equal_the_parallel_form(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = decoder_only(**changes)
    input_ids = tokens(3, LENGTH)
    logits, state = step_through(model, input_ids, model.init_state(3))
    torch.testing.assert_close(logits, model(input_ids), rtol=0, atol=1e-5)
    assert state.position == LENGTH


@torch.no_grad()
@pytest.mark.parametrize("changes", SEQ2SEQ_OPTIONS.values(), ids=SEQ2SEQ_OPTIONS.keys())
def test_steps_equal_the_parallel_form_with_an_encoder(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = seq2seq(**changes)
    input_ids, encoder_ids = tokens(3, LENGTH), tokens(3, 9)
    encoder_valid = torch.arange(9) < torch.tensor([[9], [6], [1]])
    logits, _ = step_through(model, input_ids, model.init_state(3, encoder_ids, encoder_valid))
    parallel = model(input_ids, encoder_ids, encoder_valid=encoder_valid)
    torch.testing.assert_close(logits, parallel, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"decoder_attn_layer": -2}, {"slots": {"segment_len": 1}}], ids=["attention", ""])
def test_a_step_leaves_the_state_it_came_from(changes: dict[str, Any]) -> None:
    """So decoding can go on from it twice; at the end of a segment, where the memory is handed over, as well."""
    torch.manual_seed(1)
    model = decoder_only(**changes)
    _, state = step_through(model, tokens(2, SEGMENT), model.init_state(2))
    before = [tensor.clone() for tensor in tensors_of(state)]
    first, second, again = tokens(2, 4), tokens(2, 4), state
    wanted, _ = step_through(model, first, state)
    step_through(model, second, state)
    got, _ = step_through(model, first, again)
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(state), strict=True))


@torch.no_grad()
def test_memory_is_constant_but_for_the_attention_cache() -> None:
    def sizes(model: SlotMambaForCausalLM, length: int) -> list[int]:
        _, state = step_through(model, tokens(1, length), model.init_state(1))
        return [tensor.numel() for tensor in tensors_of(state)]

    model = decoder_only()
    assert sizes(model, 3) == sizes(model, 3 * SEGMENT)
    model = decoder_only(decoder_attn_layer=1)
    grown = [long - short for short, long in zip(sizes(model, 3), sizes(model, 8), strict=True)]
    # Keys and values of 5 more tokens.
    assert sorted(grown)[-2:] == [5 * 16, 5 * 16] and sum(grown) == 2 * 5 * 16


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"decoder_attn_layer": -2}], ids=["", "attention"])
def test_steps_equal_the_parallel_form_under_autocast(changes: dict[str, Any]) -> None:
    """Both round to bfloat16, at the same places: they are no further apart than bfloat16 is from float32."""
    torch.manual_seed(0)
    model = decoder_only(**changes)
    input_ids = tokens(3, LENGTH)
    exact = model(input_ids)
    with torch.autocast("cpu", torch.bfloat16):
        parallel = model(input_ids).float()
        steps = step_through(model, input_ids, model.init_state(3))[0].float()
    rounding = (parallel - exact).abs().mean()
    assert 0 < rounding < 0.1 * exact.abs().mean()
    assert (steps - parallel).abs().mean() <= rounding
