"""The models as a whole: losses, weights, configurations, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from slotmamba.config.schema import ModelConfig
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq, build_model
from slotmamba.models.slot_memory import _use
from slotmamba_kernels import kronecker_topk
from tests.models.model_cases import (
    LENGTH,
    SEGMENT,
    HKSACalls,
    config,
    decoder_only,
    random_document_starts,
    seq2seq,
    seq2seq_config,
    tokens,
)
from tests.seeds import seed_afresh

# Losses


@pytest.mark.parametrize("encoder", [False, True], ids=["", "encoder"])
def test_losses_are_those_of_the_logits(encoder: bool) -> None:
    seed_afresh()
    inputs: dict[str, Tensor] = {"input_ids": tokens(3, LENGTH), "doc_start": random_document_starts(3, LENGTH)}
    if encoder:
        inputs |= {"encoder_ids": tokens(3, 9), "encoder_valid": torch.arange(9) < torch.tensor([[9], [4], [7]])}
    model = seq2seq() if encoder else decoder_only()
    labels = torch.where(torch.rand(3, LENGTH) < 0.4, tokens(3, LENGTH), -100)
    losses, logits = model.losses(labels=labels, **inputs), model(**inputs)
    labelled = labels != -100
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, LENGTH)
    torch.testing.assert_close(losses.nll, nll[labelled], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.z, logits.logsumexp(-1)[labelled] ** 2, rtol=1e-5, atol=1e-5)
    assert torch.equal(losses.correct, (logits.argmax(-1) == labels)[labelled])
    assert torch.equal(torch.stack([losses.row, losses.position], 1), labelled.nonzero())


def test_rows_without_labels_have_no_losses() -> None:
    model = decoder_only()
    losses = model.losses(tokens(2, LENGTH), torch.full((2, LENGTH), -100))
    assert losses.nll.shape == losses.z.shape == losses.correct.shape == losses.row.shape == (0,)
    assert losses.balance.isfinite()


@torch.no_grad()
def test_balance_is_the_missing_entropy_of_the_factors() -> None:
    """Of each factor's mean distribution over a row's tokens, write and read, mean over heads, rows and layers."""
    seed_afresh()
    model = decoder_only(decoder_layers=2)
    logits: list[Tensor] = []
    for layer in model.decoder.layers:
        layer.slots._address_logits = _recording(layer.slots._address_logits, logits)
    balance = model.losses(tokens(2, LENGTH), tokens(2, LENGTH)).balance
    assert len(logits) == 4
    expected = 0.0
    for of_call in logits:
        for row in range(2):
            for head in range(2):
                for factor in range(3):
                    mean = of_call[row, :, head, factor].softmax(-1).mean(0)
                    expected += (torch.tensor(2.0).log() + (mean * mean.log()).sum()).item() / (2 * 2 * 2)
    assert balance.item() == pytest.approx(expected, abs=1e-5)


def _recording(function: Any, calls: list[Any]) -> Any:
    def record(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls.append(result)
        return result

    return record


# Weights and configurations


def test_tied_embeddings_are_one_parameter() -> None:
    tied, free = SlotMambaForCausalLM(config()), SlotMambaForCausalLM(config(tie_embeddings=False))
    assert tied.output.weight is tied.embedding.weight
    assert len({id(parameter) for parameter in tied.parameters()}) + 1 == len(list(free.parameters()))
    assert free.output.weight.data_ptr() != free.embedding.weight.data_ptr()
    before = tied(torch.tensor([[1, 2]]))
    with torch.no_grad():
        tied.embedding.weight[3] += 1
    assert not torch.equal(tied(torch.tensor([[1, 2]]))[..., 3], before[..., 3])


def test_seed_decides_the_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_model(seq2seq_config()).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


def test_reading_starts_with_the_addresses_of_writing() -> None:
    memory = SlotMambaForCausalLM(config()).decoder.layers[0].slots
    assert torch.equal(memory.read_address.weight, memory.write_address.weight)
    assert memory.read_address.weight.data_ptr() != memory.write_address.weight.data_ptr()


def test_temperatures_gates_and_norms_have_no_weight_decay() -> None:
    """What hksa.md section 8 found to matter; the optimizer decays matrices that do not say otherwise."""
    model = build_model(seq2seq_config(mlp_ratio=2.0, decoder_attn_layer=0))
    kept = {name for name, x in model.named_parameters() if x.ndim < 2 or getattr(x, "no_weight_decay", False)}
    slots = "decoder.layers.1.slots."
    for name in (
        "log_temperature",
        "decay_power",
        "norm.weight",
        "surprise_mix",
        "surprise_memory",
        "write_conv.weight",
    ):
        assert slots + name in kept
    assert {
        slots + "surprise_gate.bias",
        slots + "surprise_gate.slope",
        "decoder.layers.1.lru.gate_proj.weight",
    } <= kept
    decayed = {name for name, _ in model.named_parameters()} - kept
    assert {slots + "q_proj.weight", slots + "write_address.weight", slots + "out_proj.weight"} <= decayed


def test_log_temperature_starts_where_the_recipe_says() -> None:
    memory = SlotMambaForCausalLM(config(slots={"log_temperature": 1.5})).decoder.layers[0].slots
    assert torch.equal(memory.log_temperature, torch.full((2, 2), 1.5))


def test_build_model_picks_the_class() -> None:
    assert type(build_model(config())) is SlotMambaForCausalLM
    assert type(build_model(seq2seq_config())) is SlotMambaForSeq2Seq


def test_models_refuse_the_others_config() -> None:
    with pytest.raises(ValueError, match="SlotMambaForCausalLM has no encoder: set encoder_layers=0"):
        SlotMambaForCausalLM(seq2seq_config())
    with pytest.raises(ValueError, match="SlotMambaForSeq2Seq needs an encoder: set encoder_layers"):
        SlotMambaForSeq2Seq(config())
    with pytest.raises(ValueError, match="starts from encoder_ids"):
        seq2seq().init_state(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_inject_layers": [0]}, "decoder_inject_layers needs an encoder"),
        ({"encoder_layers": 1}, "an encoder reaches the decoder only through decoder_inject_layers"),
        ({"encoder_layers": 1, "decoder_inject_layers": [3]}, "decoder_inject_layers=.3.: expected distinct layers"),
        ({"decoder_attn_layer": 3}, "decoder_attn_layer=3 is not one of the 3 decoder layers"),
        ({"decoder_attn_layer": -4}, "decoder_attn_layer=-4"),
        ({"n_heads": 3}, "d_model=16 is not divisible by n_heads=3"),
        ({"slots": {"addressing": "flat"}}, "flat addressing has one factor"),
        ({"slots": {"top_k": 9}}, "top_k=9 is more than the .* = 8 slots"),
        ({"slots": {"factors": 10, "factor_size": 5}}, "more than the 1048576 that are supported"),
    ],
)
def test_impossible_combinations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


# Precision


@pytest.mark.parametrize("encoder", [False, True], ids=["", "encoder"])
def test_autocast_keeps_addresses_decay_and_state_in_float32(monkeypatch: pytest.MonkeyPatch, encoder: bool) -> None:
    seed_afresh()
    calls = HKSACalls(monkeypatch)
    logits: list[Tensor] = []
    monkeypatch.setattr("slotmamba.models.slot_memory.kronecker_topk", _recording_first(kronecker_topk, logits))
    inputs = {"input_ids": tokens(2, LENGTH), "labels": tokens(2, LENGTH)}
    inputs |= {"encoder_ids": tokens(2, 9)} if encoder else {}
    model = seq2seq(decoder_attn_layer=-2) if encoder else decoder_only(decoder_attn_layer=-2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(**inputs)
        state = model.init_state(2, *[tokens(2, 9)] * encoder)
        for column in tokens(2, SEGMENT + 1).unbind(1):
            _, state = model.step(column, state)
    assert len(calls.inputs) == 3 * (4 + SEGMENT + 1) and len(logits) == 2 * 3 * (1 + SEGMENT + 1)
    assert {x.dtype for x in logits} == {torch.float32}
    for inputs in calls.inputs:
        assert {inputs[name].dtype for name in ("write_w", "read_w", "gamma")} == {torch.float32}
        assert {x.dtype for x in inputs["surprise"]} == {torch.float32}
        assert {inputs[name].dtype for name in ("u_v", "k")} == {torch.bfloat16}
    assert {o.dtype for o in calls.outputs} == {torch.bfloat16}
    memories = [memory for memory in calls.leaving if memory is not None]
    assert len(memories) == len(calls.leaving) - 3  # the last segment of each layer leaves none
    assert {x.dtype for memory in memories for x in vars(memory.dense()).values()} == {torch.float32}
    assert {x.dtype for x in (losses.nll, losses.z, losses.balance)} == {torch.float32}
    assert all(
        x.dtype == torch.float32 for layer in state.layers for x in (layer.lru, *vars(layer.slots.memory).values())
    )
    (losses.nll.mean() + losses.balance).backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def _recording_first(function: Any, calls: list[Tensor]) -> Any:
    def record(first: Tensor, *rest: Any) -> Any:
        calls.append(first)
        return function(first, *rest)

    return record


@torch.no_grad()
def test_autocast_does_not_round_the_balance_term() -> None:
    seed_afresh()
    memory = decoder_only().decoder.layers[0].slots
    logits = torch.randn(2, LENGTH, 2, 3, 2)
    for valid in (None, torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])):
        use = _use(logits, valid)
        balance = memory.balance(torch.stack([use, use]), LENGTH)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(_use(logits, valid), use)
            assert torch.equal(memory.balance(torch.stack([use, use]), LENGTH), balance)


@torch.no_grad()
def test_autocast_losses_are_close_to_those_in_float32() -> None:
    torch.manual_seed(0)
    model = decoder_only()
    inputs = {
        "input_ids": tokens(4, LENGTH),
        "labels": tokens(4, LENGTH),
        "valid": torch.ones(4, LENGTH, dtype=torch.bool),
    }
    exact = model.losses(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.losses(**inputs)
    torch.testing.assert_close(rough.nll.mean(), exact.nll.mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(rough.balance, exact.balance, rtol=0.02, atol=0)


def test_config_is_kept() -> None:
    model = build_model(config())
    assert isinstance(model.config, ModelConfig) and model.config == config()
