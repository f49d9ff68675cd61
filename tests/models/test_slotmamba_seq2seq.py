"""The encoder-decoder: its encoder reaches the decoder by injection, and only its tokens do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotmamba.models.slotmamba import SlotMambaForSeq2Seq
from tests.models.model_cases import LENGTH, SEQ2SEQ_OPTIONS, HKSACalls, seq2seq, seq2seq_config, tokens
from tests.seeds import seed_afresh

for_every_option = pytest.mark.parametrize("changes", SEQ2SEQ_OPTIONS.values(), ids=SEQ2SEQ_OPTIONS.keys())


@torch.no_grad()
@for_every_option
def test_encoder_padding_changes_nothing(changes: dict[str, Any]) -> None:
    """Neither what it holds, bitwise, nor that it is there. The seed is fixed: see test_slotmamba_causality.py."""
    torch.manual_seed(0)
    model = seq2seq(**changes)
    input_ids, encoder_ids = tokens(2, LENGTH), tokens(2, 9)
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    logits = model(input_ids, encoder_ids, encoder_valid=valid)
    other_padding = torch.where(valid, encoder_ids, tokens(2, 9))
    assert torch.equal(model(input_ids, other_padding, encoder_valid=valid), logits)
    without = model(input_ids[1:], encoder_ids[1:, :5])
    torch.testing.assert_close(logits[1:], without, rtol=0, atol=1e-5)
    longer = torch.cat([encoder_ids[1:, :5], tokens(1, 20)], 1)
    padded = model(input_ids[1:], longer, encoder_valid=torch.arange(25).unsqueeze(0) < 5)
    torch.testing.assert_close(padded, without, rtol=0, atol=1e-5)


@torch.no_grad()
@for_every_option
def test_encoder_tokens_matter_from_the_first_decoder_token_on(changes: dict[str, Any]) -> None:
    seed_afresh()
    model = seq2seq(**changes)
    input_ids, encoder_ids = tokens(1, LENGTH), tokens(1, 9)
    logits = model(input_ids, encoder_ids)
    for position in (0, 4, 8):
        changed = encoder_ids.clone()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        assert not torch.equal(model(input_ids, changed)[:, 0], logits[:, 0])


def test_gates_start_near_a_tenth_and_everything_injected_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model as it is built, with what its own encoder gives."""
    seed_afresh()
    calls = HKSACalls(monkeypatch)
    model = SlotMambaForSeq2Seq(seq2seq_config())
    losses = model.losses(tokens(2, LENGTH), tokens(2, LENGTH), tokens(2, 9))
    injected = [inputs["inject"] for inputs in calls.inputs if inputs["inject"] is not None]
    gradients = torch.autograd.grad(losses.nll.mean(), [x for call in injected for x in call], retain_graph=True)
    losses.nll.mean().backward()
    # Two layers of injection, four segments each.
    assert len(injected) == 2 * 4
    for _, _, lam_k, lam_v in injected:
        assert 0.05 < lam_k.mean() < 0.2 and 0.05 < lam_v.mean() < 0.2
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    for name, parameter in model.named_parameters():
        if ".injection." in name or name.startswith("encoder."):
            assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_the_encoders_keys_and_values_are_projected_once() -> None:
    """Not once a segment (there are four), nor once a step."""
    model = seq2seq(decoder_inject_layers=[0, 2])
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(".injection.kv_proj"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    input_ids, encoder_ids = tokens(2, LENGTH), tokens(2, 9)
    once = [f"decoder.layers.{layer}.slots.injection.kv_proj" for layer in (0, 2)]
    model(input_ids, encoder_ids)
    assert calls == once
    state = model.init_state(2, encoder_ids)
    for column in input_ids.unbind(1):
        _, state = model.step(column, state)
    assert calls == 2 * once


def test_injection_is_where_the_config_says() -> None:
    layers = seq2seq(decoder_inject_layers=[0, 2]).decoder.layers
    assert [layer.slots.injection is not None for layer in layers] == [True, False, True]


@torch.no_grad()
def test_rows_do_not_see_each_others_encoder() -> None:
    seed_afresh()
    model = seq2seq()
    input_ids, encoder_ids = tokens(2, LENGTH), tokens(2, 9)
    logits = model(input_ids, encoder_ids)
    encoder_ids[1] = tokens(9)
    input_ids[1] = tokens(LENGTH)
    assert torch.equal(model(input_ids, encoder_ids)[0], logits[0])
