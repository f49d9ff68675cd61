"""Encoder injection (hksa.md section 5): what it computes, number by number, and how it starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slotmamba.models.injection import EncoderOutput, SlotInjection
from slotmamba_kernels import SlotState
from tests.models.model_cases import document_starts, seq2seq_config
from tests.seeds import seed_afresh

BATCH, LENGTH, HEADS, ACTIVE, DIM, SLOTS, WIDTH = 2, 6, 2, 3, 8, 8, 16


def injection(**changes: object) -> SlotInjection:
    return SlotInjection(seq2seq_config(**changes))


def random_inputs(encoder_length: int = 7) -> tuple[Tensor, Tensor, SlotState, EncoderOutput]:
    """Hidden states, active slots, the memory at the start of the segment, the encoder's output."""
    write_idx = torch.rand(BATCH, LENGTH, HEADS, SLOTS).topk(ACTIVE, -1).indices.to(torch.int32)
    memory = SlotState(
        torch.randn(BATCH, HEADS, SLOTS, DIM),
        torch.randn(BATCH, HEADS, SLOTS, DIM),
        torch.rand(BATCH, HEADS, SLOTS) + 0.1,
        torch.zeros(BATCH, HEADS, SLOTS),
    )
    valid = torch.arange(encoder_length) < torch.tensor([[encoder_length], [encoder_length - 3]])
    encoder = EncoderOutput(torch.randn(BATCH, encoder_length, WIDTH), valid)
    return torch.randn(BATCH, LENGTH, WIDTH), write_idx, memory, encoder


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_equals_attention_written_out(packed: bool) -> None:
    """Slot by slot; the second row's encoder output is padded; documents of the segment see no older slot content."""
    seed_afresh()
    layer = injection()
    x, write_idx, memory, encoder = random_inputs()
    doc_start = document_starts([[-2, 3], [0, 5]], LENGTH) if packed else None
    got = layer(x, write_idx, memory, doc_start, layer.project(encoder))
    keys, values = encoder.hidden @ layer.kv_proj.weight[:WIDTH].T, encoder.hidden @ layer.kv_proj.weight[WIDTH:].T
    for b in range(BATCH):
        there = [position for position in range(7) if encoder.valid[b, position]]
        for t in range(LENGTH):
            for h in range(HEADS):
                channels = slice(h * DIM, (h + 1) * DIM)
                for a in range(ACTIVE):
                    slot = int(write_idx[b, t, h, a])
                    held_k, held_v = (s[b, h, slot] / memory.z[b, h, slot] for s in (memory.S_k, memory.S_v))
                    if doc_start is not None and doc_start[b, t] >= 0:
                        held_k, held_v = torch.zeros(DIM), torch.zeros(DIM)
                    digits = (slot // 4, slot // 2 % 2, slot % 2)
                    embedded = sum(layer.slot_embedding[u, digit] for u, digit in enumerate(digits))
                    query = (layer.q_hidden(x[b, t])[channels] + layer.q_content(held_k)) + layer.q_slot(embedded)
                    scores = torch.stack([query @ keys[b, s, channels] / DIM**0.5 for s in there])
                    attended = scores.softmax(0) @ values[b, there][:, channels]
                    want = (
                        layer.c_k_proj(attended),
                        layer.c_v_proj(attended),
                        layer.gate_k(torch.cat([held_k, attended])).sigmoid()[0],
                        layer.gate_v(torch.cat([held_v, attended])).sigmoid()[0],
                    )
                    for all_of, one in zip(got, want, strict=True):
                        torch.testing.assert_close(all_of[b, t, h, a], one, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_gates_start_near_a_tenth() -> None:
    torch.manual_seed(0)
    x, write_idx, _, encoder = random_inputs()
    empty = SlotState.initial(BATCH, HEADS, SLOTS, DIM)
    layer = injection()
    _, _, lam_k, lam_v = layer(x, write_idx, empty, None, layer.project(encoder))
    for lam in (lam_k, lam_v):
        assert lam.shape == (BATCH, LENGTH, HEADS, ACTIVE)
        assert 0.07 < lam.mean() < 0.14 and lam.min() > 0.03 and lam.max() < 0.3


@torch.no_grad()
def test_what_the_encoder_pads_with_does_not_matter() -> None:
    seed_afresh()
    layer = injection()
    x, write_idx, memory, encoder = random_inputs()
    other = torch.where(encoder.valid.unsqueeze(-1), encoder.hidden, torch.randn_like(encoder.hidden))
    for got, want in zip(
        layer(x, write_idx, memory, None, layer.project(EncoderOutput(other, encoder.valid))),
        layer(x, write_idx, memory, None, layer.project(encoder)),
        strict=True,
    ):
        assert torch.equal(got, want)


@torch.no_grad()
def test_a_row_without_encoder_tokens_is_finite() -> None:
    seed_afresh()
    layer = injection()
    x, write_idx, memory, encoder = random_inputs()
    nothing = layer.project(EncoderOutput(encoder.hidden, torch.zeros_like(encoder.valid)))
    assert all(y.isfinite().all() for y in layer(x, write_idx, memory, None, nothing))


@torch.no_grad()
def test_slots_have_distinct_embeddings() -> None:
    """One vector for each digit is enough for all p^U slots, and the digits are those of the address."""
    layer = injection()
    embedded = layer._embed(torch.arange(SLOTS))
    assert (torch.cdist(embedded, embedded) + torch.eye(SLOTS) > 1e-4).all()
    tables = layer.slot_embedding
    torch.testing.assert_close(embedded[0b110], tables[0, 1] + tables[1, 1] + tables[2, 0])


def test_gradient_reaches_every_parameter_and_input() -> None:
    seed_afresh()
    layer = injection()
    x, write_idx, memory, encoder = random_inputs()
    inputs = [x, memory.S_k, memory.S_v, memory.z, encoder.hidden]
    for leaf in inputs:
        leaf.requires_grad_()
    outputs = layer(x, write_idx, memory, None, layer.project(encoder))
    loss = torch.stack([(y * torch.randn_like(y)).sum() for y in outputs]).sum()
    gradients = torch.autograd.grad(loss, [*inputs, *layer.parameters()])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
