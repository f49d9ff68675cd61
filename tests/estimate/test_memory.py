"""Memory against real models, and tensors that autograd keeps."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.config import Recipe
from slotmamba.estimate import estimate
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq, build_model
from slotmamba.optim import build_optimizer
from tests.estimate.recipes import ENCODER, TINY, WIDE, recipe_of


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [each for field in fields(value) for each in tensors(getattr(value, field.name))]
    return [each for entry in value for each in tensors(entry)] if isinstance(value, list) else []


def distinct_bytes(found: list[Tensor]) -> int:
    """Bytes of the tensors, those that share memory once."""
    return sum({each.data_ptr(): each.nbytes for each in found}.values())


def test_weights_and_optimizer() -> None:
    recipe = recipe_of(TINY)
    model = SlotMambaForCausalLM(recipe.model)
    optimizer = build_optimizer(model, recipe.optim)
    model.losses(torch.randint(16, (2, 12)), torch.randint(16, (2, 12))).nll.sum().backward()
    optimizer.step()
    memory = estimate(recipe).memory
    parameters = list(model.parameters())
    assert memory.parameters == memory.gradients == distinct_bytes(parameters)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    # Parameters that the loss does not reach have no moments yet: the balance term is not in it.
    reached = sum(parameter.numel() for parameter in parameters if parameter.grad is not None)
    assert distinct_bytes(moments) == 8 * reached
    assert memory.optimizer == 2 * memory.parameters


@pytest.mark.parametrize("attention", [None, 1])
def test_decoding_state(attention: int | None) -> None:
    recipe = recipe_of(TINY | {"decoder_attn_layer": attention})
    memory = estimate(recipe).memory
    model = SlotMambaForCausalLM(recipe.model)
    state, tokens = model.init_state(1), 11
    with torch.no_grad():
        for token in range(tokens):
            _, state = model.step(torch.tensor([token]), state)
    assert distinct_bytes(tensors(state)) == memory.decoding_state + tokens * memory.decoding_per_token


def test_decoding_state_of_an_encoder_decoder() -> None:
    recipe = recipe_of(TINY | ENCODER | {"vocab_size": 64, "decoder_attn_layer": None})
    model = SlotMambaForSeq2Seq(recipe.model)
    with torch.no_grad():
        state = model.init_state(1, torch.randint(64, (1, 20)))
        for token in range(11):
            _, state = model.step(torch.tensor([token]), state)
    assert distinct_bytes(tensors(state)) == estimate(recipe).memory.decoding_state


def kept_for_backward(recipe: Recipe, *inputs: Tensor, **options: Tensor) -> int:
    """Bytes that autograd keeps of one micro-batch, beside parameters and inputs."""
    model = build_model(recipe.model)
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *inputs, *options.values())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model.losses(*inputs, **options)
    assert losses.nll.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 4, "decoder_attn_layer": None, "mlp_ratio": 0.0},
        {"slots": {"factors": 3, "top_k": 4, "householder_steps": 3, "segment_len": 16}},
        {"slots": {"factors": 3, "thread_layers": False}, "bdlru": {"block_size": 8}},
    ],
)
def test_activations_within_a_factor_of_2(changes: dict[str, Any]) -> None:
    slots = {"factors": 3, "segment_len": 32}
    batch, length = 4, 64
    recipe = recipe_of({"n_heads": 2, "decoder_layers": 2, "slots": slots} | WIDE | changes, length, batch)
    ids, labels = torch.randint(512, (2, batch, length))
    doc_start = torch.zeros(batch, length, dtype=torch.long)
    doc_start[:, 40:] = 40
    valid = torch.ones(batch, length, dtype=torch.bool)
    kept = kept_for_backward(recipe, ids, labels, doc_start=doc_start, valid=valid)
    assert 0.5 < _kept(recipe) / kept < 2


def test_activations_of_an_encoder_decoder_within_a_factor_of_2() -> None:
    recipe = recipe_of(WIDE | ENCODER | {"n_heads": 2, "decoder_layers": 2, "slots": {"factors": 3}})
    ids, labels, encoder_ids = torch.randint(512, (4, 12)), torch.randint(512, (4, 12)), torch.randint(512, (4, 20))
    labels[:, 6:] = -100
    kept = kept_for_backward(recipe, ids, labels, encoder_ids, encoder_valid=torch.ones(4, 20, dtype=torch.bool))
    assert 0.5 < _kept(recipe) / kept < 2


def _kept(recipe: Recipe) -> float:
    """The estimate without what the backward pass itself makes."""
    memory = estimate(recipe).memory
    return sum(memory.activations.values()) + memory.boundary_states - memory.activations["backward workspace"]


@pytest.mark.parametrize(("seq_len", "numbers"), [(100, 100 * 50_304), (64_000, 1280 * 50_304)])
def test_logits_take_a_block_at_most(seq_len: int, numbers: int) -> None:
    """Where they are more than the workspace of a slot layer."""
    model = TINY | {"vocab_size": 50_304, "decoder_attn_layer": None}
    assert estimate(recipe_of(model, seq_len, 1)).memory.activations["backward workspace"] == 4 * numbers


def test_bf16_keeps_less() -> None:
    recipe = recipe_of(WIDE)
    train = recipe.train.model_copy(update={"precision": "bf16"})
    half, full = (estimate(each).memory for each in (recipe.model_copy(update={"train": train}), recipe))
    assert 0.5 < sum(half.activations.values()) / sum(full.activations.values()) < 1
    assert (half.parameters, half.boundary_states) == (full.parameters, full.boundary_states)
