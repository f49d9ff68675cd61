"""Models whose memories hold only the touched slots train as those with a row for every slot."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq
from slotmamba_kernels import SlotState, hksa, hksa_threaded
from slotmamba_kernels.hksa.state import SparseSlotState
from tests.models.model_cases import HKSACalls, decoder_only, document_starts, seq2seq, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 7
SLOTS = {"factors": 3, "factor_size": 4, "top_k": 2, "segment_len": 3}  # 64 slots; 6 writes a segment and head


def trained(
    model: SlotMambaForCausalLM | SlotMambaForSeq2Seq, batch: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each labelled position, and all weights after a step of gradient descent on their mean."""
    model.zero_grad()
    losses = model.losses(**batch)
    (losses.nll.mean() + losses.balance).backward()
    with torch.no_grad():
        weights = {name: x - 0.5 * x.grad if x.grad is not None else x.clone() for name, x in model.named_parameters()}
    return losses.nll.detach(), weights


@pytest.mark.parametrize("encoder", [False, True], ids=["", "encoder"])
def test_a_step_of_training_is_the_same(monkeypatch: pytest.MonkeyPatch, encoder: bool) -> None:
    """Sparse memories on the Triton backend, handed over between layers and looked up by injection, against dense ones
    on the torch backend. The seed is fixed: two slots may weigh the same to within rounding."""
    from slotmamba_kernels.hksa import triton_op
    from slotmamba_kernels.threading import segments

    torch.manual_seed(0)
    monkeypatch.setattr(triton_op, "DENSE_SLOTS", 32)
    monkeypatch.setattr(segments, "MOST_BUCKETS", 32)
    batch: dict[str, Any] = {"input_ids": tokens(2, LENGTH), "labels": tokens(2, LENGTH)}
    batch["doc_start"] = document_starts([[0, 4], [0]], LENGTH)
    model: SlotMambaForCausalLM | SlotMambaForSeq2Seq
    if encoder:
        model = seq2seq(decoder_layers=2, decoder_inject_layers=[1], slots=SLOTS)
        batch["encoder_ids"] = tokens(2, 5)
    else:
        model = decoder_only(decoder_layers=2, slots=SLOTS)
    model, batch = model.to(DEVICE), {name: x.to(DEVICE) for name, x in batch.items()}

    def run(backend: str) -> tuple[list[SlotState | None], Tensor, dict[str, Tensor]]:
        calls = HKSACalls(monkeypatch)
        monkeypatch.setattr("slotmamba.models.slot_memory.hksa_threaded", partial(hksa_threaded, backend=backend))
        loss, weights = trained(model, batch)
        return [inputs["state"] for inputs in calls.inputs], loss, weights

    dense, want, expected = run("torch")
    sparse, got, weights = run("triton")
    for memories, kind in ((dense, False), (sparse, True)):
        assert [memory is None for memory in memories] == [True, False, False] * 2
        assert all(isinstance(memory, SparseSlotState) == kind for memory in memories if memory is not None)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for name, x in weights.items():
        difference = float((x - expected[name]).abs().max())
        assert difference <= 1e-5, f"{name}: off by {difference:.1e}"
    gate = "decoder.layers.1.slots.surprise_gate.slope"
    assert not torch.equal(weights[gate], model.get_parameter(gate))


@torch.no_grad()
def test_decoding_keeps_a_row_for_every_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    from slotmamba_kernels.hksa import triton_op

    torch.manual_seed(0)
    monkeypatch.setattr(triton_op, "DENSE_SLOTS", 32)
    monkeypatch.setattr("slotmamba.models.slot_memory.hksa", partial(hksa, backend="triton"))
    model = decoder_only(decoder_layers=2, slots=SLOTS).to(DEVICE)
    input_ids = tokens(1, 4).to(DEVICE)
    state, logits = model.init_state(1), []
    for column in input_ids.unbind(1):
        step, state = model.step(column, state)
        logits.append(step)
    assert all(not isinstance(layer.slots.memory, SparseSlotState) for layer in state.layers)
    torch.testing.assert_close(torch.stack(logits, 1), model(input_ids), rtol=0, atol=1e-5)
