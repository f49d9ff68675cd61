"""Bytes of one process: weights and what training keeps beside them, activations, slot state.

Activations are what autograd keeps of one micro-batch for the backward pass, tensor by tensor as the layers' code makes
them (PyTorch operations, not fused kernels), and the largest thing that the backward pass adds while all of that is
still there: a block of logits or the workspace of one slot layer. Left out are vectors much smaller than a token's
hidden state. Under bfloat16 autocast the operands of matrix products are kept in 2 bytes a number, while norms,
gates, addresses and the slot memory stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.config.schema import ModelConfig, Recipe
from slotmamba.estimate.row import RowShape, row_shape
from slotmamba.estimate.sharding import Shares
from slotmamba_kernels.cross_entropy.chunked import block_rows

FLOAT, INDEX = 4, 8  # bytes of a float32 and an int64


@dataclass(frozen=True)
class Memory:
    """Bytes.

    parameters, gradients: float32; optimizer: AdamW's two float32 moments, and with deepspeed a copy of the weights;
    gathered: parameters and gradients of other processes' shares, for a time; host: in CPU memory instead;
    autocast: the weights in bfloat16, which autocast makes once a micro-batch;
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
    config, row, rows = recipe.model, row_shape(recipe), recipe.train.micro_batch
    matrix = 2 if recipe.train.precision == "bf16" else FLOAT
    activations = {name: number * row.tokens * rows for name, number in _activations(config, row, matrix).items()}
    workspace = row.tokens * rows * _workspace(config, row)
    activations["backward workspace"] = max(workspace, _logits(config, row.labelled * row.tokens * rows, matrix))
    return Memory(
        parameters=shares.parameters,
        gradients=shares.gradients,
        optimizer=shares.optimizer,
        gathered=shares.gathered,
        host=shares.host,
        autocast=_rounded(parameters, matrix),
        activations=activations,
        boundary_states=rows * _boundaries(config, row) * config.decoder_layers * slot_state(config),
        decoding_state=_decoding_state(config, row),
        decoding_per_token=2 * FLOAT * config.d_model if config.attention_layer is not None else 0,
    )


def slot_state(config: ModelConfig) -> int:
    """One layer's slot memory of one sequence: S_k, S_v, z and surprise of all slots of all heads, float32."""
    return FLOAT * config.n_heads * config.slots.num_slots * (2 * config.head_dim + 2)


def _boundaries(config: ModelConfig, row: RowShape) -> int:
    """Ends of segments whose state the layer above or the next segment still needs in the backward pass."""
    threaded = config.slots.thread_layers and config.decoder_layers > 1
    return -(-row.tokens // config.slots.segment_len) - 1 if threaded else 0


def _decoding_state(config: ModelConfig, row: RowShape) -> int:
    """Slot memory now and at the start of the segment, the write address's window, the linear recurrence; in layers
    with injection the encoder's keys and values, and which of them count."""
    entries = config.n_heads * config.slots.factors * config.slots.factor_size
    window = FLOAT * (config.slots.address_conv - 1) * entries
    layer = 2 * slot_state(config) + window + FLOAT * config.d_model
    injected = row.encoder_tokens * (2 * FLOAT * config.d_model + 1)
    return config.decoder_layers * layer + len(config.decoder_inject_layers) * injected


def _activations(config: ModelConfig, row: RowShape, matrix: int) -> dict[str, float]:
    """Bytes per decoder token by part; ``matrix`` bytes a number of a matrix product."""
    width, layers = config.d_model, config.decoder_layers
    share, encoder = row.encoder_tokens / row.tokens, _encoder(config, row.encoder_tokens, matrix)
    parts = {f"encoder {name}": number * share for name, number in encoder.items()}
    if config.attention_layer is not None:
        parts["attention"] = _attention(width, row.tokens, matrix)
    parts["BD-LRU"] = layers * _bdlru(config, matrix)
    parts["slot memory"] = layers * _slot_memory(config, row, matrix)
    if config.decoder_inject_layers:
        parts["injection"] = len(config.decoder_inject_layers) * _injection(config, row, matrix)
    if config.mlp_ratio:
        parts["MLP"] = layers * _mlp(config, matrix)
    parts["output"] = (1 + row.labelled) * FLOAT * width  # final norm; what it gives labelled positions
    return parts


def _logits(config: ModelConfig, labels: float, matrix: int) -> float:
    """The block of logits that exists at a time, which becomes their gradient; under autocast also in float32."""
    rows = min(labels, block_rows(config.vocab_size, "cuda"))
    return rows * config.vocab_size * (matrix if matrix == FLOAT else matrix + FLOAT)


def _encoder(config: ModelConfig, length: int, matrix: int) -> dict[str, float]:
    """Per encoder token."""
    attentive = len(config.encoder_attn_layers)
    if not config.encoder_layers:
        return {}
    parts = {
        "Mamba-2": (config.encoder_layers - attentive) * _bidirectional_mamba2(config, length, matrix),
        "attention": attentive * _attention(config.d_model, length, matrix),
        "MLP": config.encoder_layers * _mlp(config, matrix),
    }
    return {name: number for name, number in parts.items() if number}


def _entry(width: int, matrix: int) -> int:
    """What every sublayer begins with: the residual stream, which its norm keeps, and the normed input of matrices."""
    return (FLOAT + matrix) * width


def _mlp(config: ModelConfig, matrix: int) -> float:
    """Gate, its silu, up and their product."""
    hidden = -(-round(config.mlp_ratio * config.d_model) // 8) * 8
    return _entry(config.d_model, matrix) + 4 * matrix * hidden if hidden else 0


def _attention(width: int, seen: int, matrix: int) -> float:
    """q and k before (float32) and after their rotation, v, the output; the mask of documents as bool and numbers."""
    return _entry(width, matrix) + 2 * FLOAT * width + 5 * matrix * width + (1 + matrix) * seen


def _bdlru(config: ModelConfig, matrix: int) -> float:
    """v and h; the gates as softmax leaves them and with padding masked; under autocast the gates' input once more."""
    width, gates = config.d_model, config.d_model * (config.bdlru.block_size + 1)
    return _entry(width, matrix) + FLOAT * (2 * width + 2 * gates) + _rounded(2 * width, matrix)


def _rounded(numbers: int, matrix: int) -> int:
    """The copies that autocast makes of float32 numbers (or back)."""
    return 0 if matrix == FLOAT else matrix * numbers


def _slot_memory(config: ModelConfig, row: RowShape, matrix: int) -> float:
    """Addresses (entries a head, K indices a factor), q, k, u_k, u_v before and after their norms (which autocast makes
    in float32), the states after each of the K writes and, for each segment, those of the touched slots before and
    after it, numbers and indices of each write and read, and the gated output."""
    slots, width, heads = config.slots, config.d_model, config.n_heads
    active, steps = slots.top_k, slots.householder_steps
    entries = heads * slots.factors * slots.factor_size
    addresses = FLOAT * entries * (slots.address_conv + 6) + 2 * heads * active * (INDEX * slots.factors + FLOAT)
    vectors = matrix * width * (1 + 2 * steps) + FLOAT * width * (1 + 3 * steps)
    if matrix < FLOAT:
        vectors += FLOAT * width * (1 + steps)
    states = FLOAT * 2 * width * active + 2 * _touched_states(config, row)
    events = heads * active * (7 * INDEX + FLOAT * (20 + 2 * steps))
    output = 5 * FLOAT * width + _rounded(width, matrix)
    return _entry(width, matrix) + addresses + vectors + states + events + output


def _touched_states(config: ModelConfig, row: RowShape) -> float:
    """The states of the slots that a segment touches, by token: at most all slots, at most one an event."""
    segment = min(config.slots.segment_len, row.tokens)
    touched = min(config.slots.num_slots, 2 * config.slots.top_k * segment)
    return FLOAT * 2 * config.d_model * touched / segment


def _workspace(config: ModelConfig, row: RowShape) -> float:
    """In one slot layer's backward pass: gradients of the states, their adjoints, and each write's share of the
    gradients of k, u_k and u_v; of a segment at a time, given by token of the row."""
    threaded = config.slots.thread_layers and config.decoder_layers > 1
    length = min(config.slots.segment_len, row.tokens) if threaded or config.decoder_inject_layers else row.tokens
    active, steps = config.slots.top_k, config.slots.householder_steps
    return FLOAT * config.d_model * active * (4 + 3 * steps) * length / row.tokens


def _injection(config: ModelConfig, row: RowShape, matrix: int) -> float:
    """Contents as read and divided, embedding, query, attended vector and its copies, the gates' inputs, and what is
    added to the states; keys and values of the encoder."""
    a_slot = config.d_model * (8 * FLOAT + 7 * matrix) + INDEX * config.n_heads * config.slots.factors
    return config.slots.top_k * a_slot + 2 * matrix * config.d_model * row.encoder_tokens / row.tokens


def _bidirectional_mamba2(config: ModelConfig, length: int, matrix: int) -> float:
    """Of each direction: the input in order, in_proj's output, the convolution's and its silu; in the scan decays and
    weighted scores of a chunk's token pairs, four forms of the inputs, B and C as they are and for every head, and two
    copies of the chunks' states; the output, its gate, their product, and its norm twice."""
    ssm, width = config.ssm, config.d_model
    inner, states, size = ssm.expand * width, ssm.state_size, min(ssm.chunk_size, length)
    heads, convolved = inner // ssm.head_dim, inner + 2 * states
    padding = -(-length // size) * size / length
    projected = matrix * (width + inner + 3 * convolved + heads) + _rounded(2 * convolved, matrix)
    pairs = 2 * size * heads + size
    scan = FLOAT * padding * (pairs + 4 * inner + 2 * (heads + 1) * states + 2 * inner * states / size)
    output = 3 * matrix * inner + 2 * FLOAT * inner
    return _entry(width, matrix) + 2 * (projected + scan + output)
