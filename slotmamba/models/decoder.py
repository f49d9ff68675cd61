"""The decoder: layers of attention (at one of them), BD-LRU, slot memory and SwiGLU, each pre-normed and residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slotmamba.config.schema import Checkpointing, ModelConfig
from slotmamba.models.attention import Attention, KVCache
from slotmamba.models.bdlru import BDLRU
from slotmamba.models.injection import EncoderMemory, EncoderOutput
from slotmamba.models.layers import SwiGLU
from slotmamba.models.recompute import chunked, run_layer
from slotmamba.models.slot_memory import SlotLayerState, SlotMemory
from slotmamba_kernels import SegmentEnds, SlotState
from slotmamba_kernels.hksa.arguments import documents_of


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


@dataclass(frozen=True)
class ChunkState:
    """What a layer carries from one chunk of a row to the next: its recurrences, and the keys and values of the chunks
    so far, each as it was made, so that keeping them for every chunk's recomputation keeps them once."""

    lru: Tensor
    memory: SlotState
    window: Tensor | None
    attention: list[KVCache]


@dataclass(frozen=True)
class ChunkOutput:
    """x [B, T, C]; the state, None after the last chunk; `ends` and `use` as `SlotMemory` returns them."""

    x: Tensor
    state: ChunkState | None
    ends: SegmentEnds
    use: Tensor


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
        chunks: list[slice],
        below: list[SegmentEnds] | None,
        doc_start: Tensor | None,
        valid: Tensor | None,
        encoder: EncoderOutput | None,
        checkpointing: Checkpointing,
    ) -> tuple[Tensor, list[SegmentEnds], Tensor]:
        """x [B, T, C] -> x [B, T, C], the slot memories at the ends of the segments of each chunk, the balance term.

        chunks: of the row; below: what the layer below returns of them; checkpointing: what is kept of each chunk for
        the backward pass.
        """
        memory = self._encoder_memory(encoder)
        # One split, not a slice for each chunk: its backward pass puts the gradients of all chunks together once.
        pieces = x.split([chunk.stop - chunk.start for chunk in chunks], 1)
        state: ChunkState | None = None
        outputs: list[ChunkOutput] = []
        for number, (chunk, piece) in enumerate(zip(chunks, pieces, strict=True)):
            ends = (None, None) if below is None else (below[number - 1][-1] if number else None, below[number])
            output = run_layer(
                checkpointing, self._chunk, piece, state, chunk, *ends, doc_start, valid, memory,
                number + 1 == len(chunks),
            )  # fmt: skip
            outputs.append(output)
            state = output.state
        xs = [output.x for output in outputs]
        use = outputs[0].use
        for output in outputs[1:]:
            use = use + output.use
        balance = self.slots.balance(use, x.shape[1] if valid is None else valid.sum(1))
        return xs[0] if len(xs) == 1 else torch.cat(xs, 1), [output.ends for output in outputs], balance

    def _chunk(
        self,
        x: Tensor,
        state: ChunkState | None,
        span: slice,
        below_before: SlotState | None,
        below: SegmentEnds | None,
        doc_start: Tensor | None,
        valid: Tensor | None,
        encoder: EncoderMemory | None,
        last: bool,
    ) -> ChunkOutput:
        """The next chunk, x [B, T, C], of whole segments; doc_start, valid and encoder are those of the row.

        state: after the chunk before, None at a row's start; below_before, below: memories of the layer below at the
        end of that chunk, and at the ends of this one's segments.
        """
        attended = [] if state is None else state.attention
        if self.attention is not None and self.attention_norm is not None:
            y, own = self.attention.extend(
                self.attention_norm(x), attended, None if doc_start is None else doc_start[:, span],
                None if valid is None else valid[:, : span.stop],
            )  # fmt: skip
            if not last:
                # A copy: the values are part of a larger tensor, which would be kept with them.
                attended = [*attended, KVCache(own.keys, own.values.clone())]
            x = x + y
        doc_start = documents_of(doc_start, span)
        valid = None if valid is None else valid[:, span]
        y, lru = self.lru(self.lru_norm(x), None if state is None else state.lru, doc_start, valid)
        x = x + y
        y, ends, window, use = self.slots(
            self.slots_norm(x),
            memory=None if state is None else self.slots.hand_over(state.memory, below_before),
            below=below,
            window=None if state is None else state.window,
            doc_start=doc_start,
            valid=valid,
            encoder=encoder,
            return_state=not last,
        )
        after = None if last else ChunkState(lru, ends[-1], window, attended)
        return ChunkOutput(self._mlp(x + y), after, ends, use)

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
        self.checkpointing: Checkpointing = "none"
        self.sequence_chunks = 1

    def forward(
        self,
        x: Tensor,
        *,
        doc_start: Tensor | None = None,
        valid: Tensor | None = None,
        encoder: EncoderOutput | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, C] embeddings -> normed hidden states [B, T, C] and the balance term, a mean over layers."""
        # Without a backward pass chunks would save nothing.
        chunks = chunked(self.config, x.shape[1], self.sequence_chunks if torch.is_grad_enabled() else 1)
        checkpointing = "block" if self.checkpointing == "none" and len(chunks) > 1 else self.checkpointing
        below: list[SegmentEnds] | None = None
        balances = []
        for layer in self._decoder_layers():
            x, below, balance = layer(
                x,
                chunks=chunks,
                below=below,
                doc_start=doc_start,
                valid=valid,
                encoder=encoder,
                checkpointing=checkpointing,
            )
            balances.append(balance)
        return self.norm(x), torch.stack(balances).mean()

    def step(self, x: Tensor, state: DecoderState, *, consume: bool = False) -> tuple[Tensor, DecoderState]:
        """One token for every row: x [B, C] -> normed hidden state [B, C] and the state after it.

        consume: `state`, which a step has returned, may be overwritten and is not to be used again.
        """
        layers = state.layers
        if self.config.segmented and state.position and state.position % self.config.slots.segment_len == 0:
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

    def _initial_slots(self, batch: int, device: torch.device) -> SlotState:
        config = self.config
        return SlotState.initial(batch, config.n_heads, config.slots.num_slots, config.head_dim, device=device)
