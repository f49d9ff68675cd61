"""Encoder injection: active write slots attend to the encoder's output (hksa.md section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmamba.config.schema import ModelConfig
from slotmamba.models.initial import constant, normal, starts
from slotmamba_kernels import SlotState

START_SHARE = 0.1


@dataclass(frozen=True)
class EncoderOutput:
    """Output of the encoder [B, S, C] and which of its positions are tokens [B, S]."""

    hidden: Tensor
    valid: Tensor


@dataclass(frozen=True)
class EncoderMemory:
    """What the slots of one layer attend to: keys and values [B, H, S, d], and which of them count [B, 1, 1, S]."""

    keys: Tensor
    values: Tensor
    mask: Tensor


class SlotInjection(nn.Module):
    """What the encoder puts into the slots that a decoder token writes.

    The query of a slot is W [hidden state, the slot's key content at the start of the segment, slot embedding]; the
    slot embedding is a sum of U small tables, one for each digit of the slot's index.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dim = config.n_heads, config.head_dim
        self.factors, self.factor_size = config.slots.factors, config.slots.factor_size
        self.slot_embedding = starts(nn.Parameter(torch.empty(self.factors, self.factor_size, self.dim)), normal(0.02))
        self.slot_embedding.no_weight_decay = True  # type: ignore[attr-defined]
        self.q_hidden = nn.Linear(config.d_model, config.d_model, bias=False)
        self.q_content = nn.Linear(self.dim, self.dim, bias=False)
        self.q_slot = nn.Linear(self.dim, self.dim, bias=False)
        self.kv_proj = nn.Linear(config.d_model, 2 * config.d_model, bias=False)
        self.c_k_proj = nn.Linear(self.dim, self.dim, bias=False)
        self.c_v_proj = nn.Linear(self.dim, self.dim, bias=False)
        self.gate_k = nn.Linear(2 * self.dim, 1)
        self.gate_v = nn.Linear(2 * self.dim, 1)
        for gate in (self.gate_k, self.gate_v):
            starts(gate.bias, constant(math.log(START_SHARE / (1 - START_SHARE))))

    def project(self, encoder: EncoderOutput) -> EncoderMemory:
        """This layer's keys and values of the encoder's output: once a sequence, however many segments and steps."""
        shape = (len(encoder.hidden), -1, 2, self.heads, self.dim)
        keys, values = self.kv_proj(encoder.hidden).view(shape).permute(2, 0, 3, 1, 4)
        # A row without any encoder token attends to its padding instead of dividing by zero.
        mask = encoder.valid | ~encoder.valid.any(-1, keepdim=True)
        return EncoderMemory(keys, values, mask[:, None, None])

    def forward(
        self,
        x: Tensor,
        write_idx: Tensor,
        segment_start: SlotState | None,
        doc_start: Tensor | None,
        encoder: EncoderMemory,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, C], write_idx [B, T, H, K], `project`'s memory -> c_k, c_v [B, T, H, K, d] and lam_k, lam_v
        [B, T, H, K].

        segment_start: the memory as the segment began, None for the initial one.
        """
        content_k, content_v = self._contents(segment_start, write_idx, doc_start)
        batch, length, heads, _ = write_idx.shape
        hidden = self.q_hidden(x).view(batch, length, heads, 1, self.dim)
        query = hidden + self.q_content(content_k) + self.q_slot(self._embed(write_idx))
        attended = self._attend(query, encoder).to(content_k.dtype)
        lam_k = self.gate_k(torch.cat([content_k, attended], -1)).squeeze(-1).sigmoid()
        lam_v = self.gate_v(torch.cat([content_v, attended], -1)).squeeze(-1).sigmoid()
        return self.c_k_proj(attended), self.c_v_proj(attended), lam_k, lam_v

    def _contents(self, memory: SlotState | None, index: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the slots held when the segment began, keys and values [B, T, H, K, d]; 0 for documents that began in
        the segment."""
        if memory is None:
            nothing = self.slot_embedding.new_zeros(*index.shape, self.dim)
            return nothing, nothing
        held_k, held_v = memory.contents(index)
        if doc_start is None:
            return held_k, held_v
        entered = (doc_start < 0).view(*doc_start.shape, 1, 1, 1)
        return held_k.where(entered, 0), held_v.where(entered, 0)

    def _embed(self, index: Tensor) -> Tensor:
        """Sum over the U digits of a slot's index of the digit's vector: [..., K] -> [..., K, d]."""
        index = index.long()
        embedded = torch.zeros((), device=index.device)
        for u in range(self.factors):
            digit = index // self.factor_size ** (self.factors - 1 - u) % self.factor_size
            embedded = embedded + F.embedding(digit, self.slot_embedding[u])
        return embedded

    def _attend(self, query: Tensor, encoder: EncoderMemory) -> Tensor:
        """Cross-attention of queries [B, T, H, K, d] to the encoder's tokens."""
        batch, length, heads, active, dim = query.shape
        query = query.permute(0, 2, 1, 3, 4).reshape(batch, heads, length * active, dim).to(encoder.keys.dtype)
        attended = F.scaled_dot_product_attention(query, encoder.keys, encoder.values, attn_mask=encoder.mask)
        return attended.view(batch, heads, length, active, dim).permute(0, 2, 1, 3, 4)
