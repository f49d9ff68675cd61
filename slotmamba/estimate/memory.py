"""Bytes of one process: weights and what training keeps beside them, activations, slot state."""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.config.schema import ModelConfig, Recipe
from slotmamba.estimate.activations import WORKSPACE, activations, layer_bytes, recomputes
from slotmamba.estimate.layers import FLOAT, slot_memory
from slotmamba.estimate.row import RowShape
from slotmamba.estimate.sharding import Shares


@dataclass(frozen=True)
class Memory:
    """Bytes.

    parameters, gradients: float32; optimizer: AdamW's two float32 moments, and with deepspeed a copy of the weights;
    gathered: parameters and gradients of other processes' shares, for a time; host: in CPU memory instead;
    autocast: the weights in bfloat16, which autocast makes once a micro-batch and keeps where nothing is recomputed;
    activations: of one micro-batch, by part;
    boundary_states: of the slot memory at the ends of segments, kept for the backward pass, one micro-batch;
    decoding_state: of one sequence, whatever its length; decoding_per_token: what attention's cache adds a token.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    host: int
    autocast: int
    activations: dict[str, float]
    boundary_states: int
    decoding_state: int
    decoding_per_token: int

    @property
    def training(self) -> float:
        """All that a training process holds at its peak, but for Python, PyTorch and the data pipeline."""
        kept = self.parameters + self.gradients + self.optimizer + self.gathered + self.autocast
        return kept + sum(self.activations.values()) + self.boundary_states


def memory(recipe: Recipe, parameters: int, shares: Shares) -> Memory:
    """The memory that a recipe with so many parameters, of which each process has its share, needs in one process."""
    config, layers = recipe.model, layer_bytes(recipe)
    parts = activations(recipe)
    casts = 0 if layers.matrix == FLOAT else layers.matrix * parameters
    if recomputes(recipe):
        # Not kept for the backward pass, so gone before it makes a layer again.
        parts[WORKSPACE], casts = max(parts[WORKSPACE], casts), 0
    return Memory(
        parameters=shares.parameters,
        gradients=shares.gradients,
        optimizer=shares.optimizer,
        gathered=shares.gathered,
        host=shares.host,
        autocast=casts,
        activations=parts,
        boundary_states=recipe.train.micro_batch * _boundary_states(recipe),
        decoding_state=_decoding_state(config, layers.row),
        decoding_per_token=2 * FLOAT * config.d_model if config.attention_layer is not None else 0,
    )


def _boundary_states(recipe: Recipe) -> int:
    """Slot memories of a sequence, of all layers, that the backward pass still needs: those at the ends of segments for
    the layer above and for the next segment, and those at the ends of chunks."""
    config, later_chunks = recipe.model, recipe.train.sequence_chunks - 1
    if not (config.slots.thread_layers and config.decoder_layers > 1):
        return config.decoder_layers * later_chunks * slot_memory(config)
    # Where layers are made again the highest one's, which no layer takes over, are too.
    count = config.decoder_layers - recomputes(recipe)
    return sum(map(layer_bytes(recipe).segment_memories, range(count))) + later_chunks * slot_memory(config)


def _decoding_state(config: ModelConfig, row: RowShape) -> int:
    """Slot memory now and at the start of the segment, the write address's window, the linear recurrence; in layers
    with injection the encoder's keys and values, and which of them count."""
    entries = config.n_heads * config.slots.factors * config.slots.factor_size
    window = FLOAT * (config.slots.address_conv - 1) * entries
    layer = 2 * slot_memory(config) + window + FLOAT * config.d_model
    injected = row.encoder_tokens * (2 * FLOAT * config.d_model + 1)
    return config.decoder_layers * layer + len(config.decoder_inject_layers) * injected
