"""Small models with every option of the decoder, and rows for them."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from slotmamba.config.schema import BDLRUConfig, ModelConfig, SlotConfig, SSMConfig
from slotmamba.models import SlotMambaForCausalLM, SlotMambaForSeq2Seq
from slotmamba_kernels import SlotState, hksa

Model = TypeVar("Model", bound=nn.Module)

SEGMENT = 5
LENGTH = 3 * SEGMENT + 2
VOCABULARY = 29

# What each option changes in `config`; keys of the slot memory are under "slots".
OPTIONS: dict[str, dict[str, Any]] = {
    "threaded": {},
    "not threaded": {"slots": {"thread_layers": False}},
    "attention": {"decoder_attn_layer": -2},
    "attention, not threaded": {"decoder_attn_layer": -2, "slots": {"thread_layers": False}},
    "swiglu": {"mlp_ratio": 2.0},
    "two steps": {"slots": {"householder_steps": 2}},
    "no address convolution": {"slots": {"address_conv": 1}},
    "flat addressing": {"slots": {"addressing": "flat", "factors": 1, "factor_size": 8}},
    "all slots": {"slots": {"top_k": 8}},
    "segments of one token": {"decoder_layers": 2, "slots": {"segment_len": 1}},
    "one layer": {"decoder_layers": 1},
    "own output matrix": {"tie_embeddings": False},
    "attention, swiglu, two steps": {"decoder_attn_layer": 0, "mlp_ratio": 1.5, "slots": {"householder_steps": 2}},
}

SEQ2SEQ_OPTIONS: dict[str, dict[str, Any]] = {
    "threaded": {},
    "not threaded": {"slots": {"thread_layers": False}},
    "attention": {"decoder_attn_layer": -2, "encoder_attn_layers": [0, 1]},
    "injection in all layers": {"decoder_inject_layers": [0, 1, 2], "encoder_attn_layers": []},
    "two steps, no address convolution": {"slots": {"householder_steps": 2, "address_conv": 1}},
    "flat addressing": {"slots": {"addressing": "flat", "factors": 1, "factor_size": 8}},
}


def config(**changes: Any) -> ModelConfig:
    slots = {"factors": 3, "factor_size": 2, "top_k": 3, "segment_len": SEGMENT, **changes.pop("slots", {})}
    keys = {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "decoder_layers": 3, **changes}
    return ModelConfig(slots=SlotConfig(**slots), bdlru=BDLRUConfig(block_size=4), **keys)


def seq2seq_config(**changes: Any) -> ModelConfig:
    ssm = SSMConfig(state_size=6, head_dim=8, chunk_size=8)
    keys = {"encoder_layers": 2, "encoder_attn_layers": [1], "decoder_inject_layers": [0, 2], "ssm": ssm, **changes}
    return config(**keys)


def decoder_only(**changes: Any) -> SlotMambaForCausalLM:
    return _randomised(SlotMambaForCausalLM(config(**changes)))


def seq2seq(**changes: Any) -> SlotMambaForSeq2Seq:
    return _randomised(SlotMambaForSeq2Seq(seq2seq_config(**changes)))


def _randomised(model: Model) -> Model:
    """As if trained a little: nothing at the special value it starts from (gates, norms, slopes), logits of order 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_parameter("embedding.weight").mul_(5)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape)


def document_starts(rows: list[list[int]], length: int) -> Tensor:
    """doc_start [B, T] of rows of documents, given where each row's documents start."""
    return torch.tensor([[max(start for start in starts if start <= t) for t in range(length)] for starts in rows])


def random_document_starts(batch: int, length: int) -> Tensor:
    starts = torch.rand(batch, length) < 0.25
    starts[:, 0] = True
    return torch.where(starts, torch.arange(length), 0).cummax(1).values


class HKSACalls:
    """Stands between the models and hksa, and keeps what goes in and comes out, layer by layer, then by segment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[Tensor] = []
        self.leaving: list[SlotState | None] = []
        for module in ("slotmamba.models.slot_memory", "slotmamba_kernels.threading.segments"):
            monkeypatch.setattr(f"{module}.hksa", self)

    def __call__(self, **inputs: Any) -> tuple[Tensor, SlotState | None]:
        o, leaving = hksa(**inputs)
        self.inputs.append(inputs)
        self.outputs.append(o)
        self.leaving.append(leaving)
        return o, leaving
