"""The decoder: layers of attention (at one of them), BD-LRU, slot memory and SwiGLU, each pre-normed and residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slotmamba.config.schema import ModelConfig
from slotmamba.models.attention import Attention, KVCache
from slotmamba.models.bdlru import BDLRU
from slotmamba.models.injection import EncoderMemory, EncoderOutput
from slotmamba.models.layers import SwiGLU
from slotmamba.models.slot_memory import SlotLayerState, SlotMemory
from slotmamba_kernels import SlotState


@dataclass
class LayerState:
    """What one layer carries from token to token: its recurrences, the keys and values of attention, and those of the
    encoder's output, which stay."""

    lru: Tensor
    slots: SlotLayerState
    attention: KVCache | None
    encoder: EncoderMemory | None


@dataclass
class DecoderState:
    """State of step-by-step decoding: tokens seen so far, one state a layer."""

    position: int
    layers: list[LayerState]


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        has_attention = layer == config.attention_layer
        self.attention_norm = nn.RMSNorm(config.d_model) if has_attention else None
        self.attention = Attention(config.d_model, config.n_heads, causal=True) if has_attention else None
        self.lru_norm = nn.RMSNorm(config.d_model)
        self.lru = BDLRU(config.d_model, config.bdlru.block_size)
        self.slots_norm = nn.RMSNorm(config.d_model)
        self.slots = SlotMemory(config, layer)
        self.mlp_norm = nn.RMSNorm(config.d_model) if config.mlp_ratio else None
        self.mlp = SwiGLU(config.d_model, round(config.mlp_ratio * config.d_model)) if config.mlp_ratio else None

    def forward(
        self,
        x: Tensor,
        *,
        segments: list[slice],
        below: list[SlotState] | None,
        doc_start: Tensor | None,
        valid: Tensor | None,
        encoder: EncoderOutput | None,
    ) -> tuple[Tensor, list[SlotState], Tensor]:
        """x [B, T, C] -> x [B, T, C], the slot memory at the end of each segment but the last, the balance term."""
        if self.attention is not None and self.attention_norm is not None:
            x = x + self.attention(self.attention_norm(x), doc_start=doc_start, valid=valid)
        x = x + self.lru(self.lru_norm(x), doc_start=doc_start, valid=valid)[0]
        y, ends, balance = self.slots(
            self.slots_norm(x),
            segments=segments,
            below=below,
            doc_start=doc_start,
            valid=valid,
            encoder=self._encoder_memory(encoder),
        )
        return self._mlp(x + y), ends, balance

    def step(self, x: Tensor, state: LayerState, *, consume: bool = False) -> tuple[Tensor, LayerState]:
        """One token: x [B, C] -> x [B, C] and the state after it. consume: as in `SlotMemory.step`."""
        cache = state.attention
        if self.attention is not None and self.attention_norm is not None:
            assert cache is not None
            y, cache = self.attention.step(self.attention_norm(x), cache)
            x = x + y
        y, lru = self.lru.step(self.lru_norm(x), state.lru)
        x = x + y
        y, slots = self.slots.step(self.slots_norm(x), state.slots, state.encoder, consume=consume)
        return self._mlp(x + y), LayerState(lru, slots, cache, state.encoder)

    def init_state(self, batch: int, memory: SlotState, encoder: EncoderOutput | None) -> LayerState:
        """The state before the first token, given the slot memory before it."""
        return LayerState(
            lru=self.lru.init_state(batch, memory.z.device),
            slots=self.slots.init_state(memory),
            attention=self.attention.init_cache(batch) if self.attention is not None else None,
            encoder=self._encoder_memory(encoder),
        )

    def _encoder_memory(self, encoder: EncoderOutput | None) -> EncoderMemory | None:
        if self.slots.injection is None:
            return None
        assert encoder is not None, "a model with injection has an encoder"
        return self.slots.injection.project(encoder)

    def _mlp(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The stack of decoder layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.decoder_layers))
        self.norm = nn.RMSNorm(config.d_model)
        # Segments exist for the hand-over between layers and for injection; without either the memory runs in one go.
        self.segmented = (config.slots.thread_layers and config.decoder_layers > 1) or bool(
            config.decoder_inject_layers
        )

    def forward(
        self,
        x: Tensor,
        *,
        doc_start: Tensor | None = None,
        valid: Tensor | None = None,
        encoder: EncoderOutput | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C] embeddings -> normed hidden states [B, T, C] and the balance term, a mean over layers."""
        segments = self._segments(x.shape[1])
        below: list[SlotState] | None = None
        balances = []
        for layer in self._decoder_layers():
            x, below, balance = layer(
                x,
                segments=segments,
                below=below,
                doc_start=doc_start,
                valid=valid,
                encoder=encoder,
            )
            balances.append(balance)
        return self.norm(x), torch.stack(balances).mean()

    def step(self, x: Tensor, state: DecoderState, *, consume: bool = False) -> tuple[Tensor, DecoderState]:
        """One token for every row: x [B, C] -> normed hidden state [B, C] and the state after it.

        consume: `state`, which a step has returned, may be overwritten and is not to be used again.
        """
        layers = state.layers
        if self.segmented and state.position and state.position % self.config.slots.segment_len == 0:
            layers = self._start_segment(layers)
        after = []
        for layer, layer_state in zip(self._decoder_layers(), layers, strict=True):
            x, layer_state = layer.step(x, layer_state, consume=consume)
            after.append(layer_state)
        return self.norm(x), DecoderState(state.position + 1, after)

    def init_state(self, batch: int, encoder: EncoderOutput | None = None) -> DecoderState:
        """The state before the first token."""
        slots = self._initial_slots(batch, self.norm.weight.device)
        return DecoderState(0, [layer.init_state(batch, slots, encoder) for layer in self._decoder_layers()])

    def _decoder_layers(self) -> Iterator[DecoderLayer]:
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def _start_segment(self, layers: list[LayerState]) -> list[LayerState]:
        """Hands the memory over from layer to layer, all of it as it stood at the end of the segment before."""
        started = []
        below: SlotState | None = None
        for layer, state in zip(self._decoder_layers(), layers, strict=True):
            memory = layer.slots.hand_over(state.slots.memory, below)
            slots = SlotLayerState(memory, memory, state.slots.window)
            started.append(replace(state, slots=slots))
            below = state.slots.memory
        return started

    def _segments(self, length: int) -> list[slice]:
        size = self.config.slots.segment_len if self.segmented else length
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def _initial_slots(self, batch: int, device: torch.device) -> SlotState:
        config = self.config
        return SlotState.initial(batch, config.n_heads, config.slots.num_slots, config.head_dim, device=device)
