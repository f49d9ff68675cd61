"""Bytes of activations, by part and by what the backward pass recomputes.

They are what autograd keeps of one micro-batch for the backward pass, tensor by tensor as the layers' code makes them
(PyTorch operations, not fused kernels), and the largest thing that the backward pass adds while all of that is still
there: a block of logits, the workspace of one slot layer, or the layer (the chunk of one) that it recomputes. Left out
are vectors much smaller than a token's hidden state. Under bfloat16 autocast the operands of matrix products are kept
in 2 bytes a number, while norms, gates, addresses and the slot memory stay float32.
"""

from __future__ import annotations

from slotmamba.config.schema import ModelConfig, Recipe
from slotmamba.estimate.row import RowShape
from slotmamba.models.recompute import chunked
from slotmamba_kernels.cross_entropy.chunked import block_rows

FLOAT, INDEX = 4, 8  # bytes of a float32 and an int64
WORKSPACE = "backward workspace"


def activations(recipe: Recipe, row: RowShape, matrix: int) -> dict[str, float]:
    """Bytes of a micro-batch by part; ``matrix`` bytes a number of a matrix product.

    The backward workspace is the largest of a block of logits and a slot layer's backward pass or a recomputed layer.
    """
    config, tokens = recipe.model, row.tokens * recipe.train.micro_batch
    per_token = _recomputed(recipe, row, matrix) if recomputes(recipe) else _kept(config, row, matrix)
    parts = {name: number * tokens for name, number in per_token.items() if number}
    parts[WORKSPACE] = max(parts[WORKSPACE], _logits(config, row.labelled * tokens, matrix))
    return parts


def recomputes(recipe: Recipe) -> bool:
    """Whether decoder layers are recomputed in the backward pass."""
    return recipe.train.activation_checkpointing != "none" or recipe.train.sequence_chunks > 1


def _kept(config: ModelConfig, row: RowShape, matrix: int) -> dict[str, float]:
    """Bytes per decoder token by part where nothing is recomputed."""
    layers = config.decoder_layers
    share, encoder = row.encoder_tokens / row.tokens, _encoder(config, row.encoder_tokens, matrix)
    parts = {f"encoder {name}": number * share for name, number in encoder.items()}
    if config.attention_layer is not None:
        parts["attention"] = _attention(config.d_model, row.tokens, matrix)
    parts["BD-LRU"] = layers * _bdlru(config, matrix)
    parts["slot memory"] = layers * _slot_memory(config, row, matrix)
    parts["injection"] = len(config.decoder_inject_layers) * _injection(config, row, matrix)
    parts["MLP"] = layers * _mlp(config, matrix)
    return parts | {"output": _output(config, row), WORKSPACE: _workspace(config, row, 1)}


def _recomputed(recipe: Recipe, row: RowShape, matrix: int) -> dict[str, float]:
    """Bytes per decoder token by part where layers are recomputed, a chunk of one layer at a time."""
    config, mode = recipe.model, recipe.train.activation_checkpointing
    width, share = config.d_model, row.encoder_tokens / row.tokens
    parts = {"layer inputs": float(FLOAT * width * config.decoder_layers)}
    largest, products = 0.0, 0.0
    for layer in reversed(range(config.decoder_layers)):
        # By then the backward pass has freed the products of the layers above.
        largest = max(largest, _recomputed_layer(recipe, row, layer, matrix) - products)
        products += _products(config, layer, matrix) if mode == "selective" else 0
    if mode == "none":
        encoder = _encoder(config, row.encoder_tokens, matrix)
        parts |= {f"encoder {name}": number * share for name, number in encoder.items()}
    elif config.encoder_layers:
        parts["layer inputs"] += FLOAT * width * config.encoder_layers * share
        largest = max(largest, share * _encoder_layer(config, row.encoder_tokens, matrix) - products)
    if mode == "selective":
        parts["matrix products"] = products + share * _encoder_products(config, matrix)
    # Made once for all chunks, so not recomputed with them.
    parts["encoder keys and values"] = len(config.decoder_inject_layers) * 2 * matrix * width * share
    if config.attention_layer is not None and recipe.train.sequence_chunks > 1:
        parts["attention keys and values"] = 2 * matrix * width
    return parts | {"output": _output(config, row), WORKSPACE: largest}


def _recomputed_layer(recipe: Recipe, row: RowShape, layer: int, matrix: int) -> float:
    """What a decoder layer makes again of its longest chunk and adds in its backward pass, by token of the row."""
    config, width = recipe.model, recipe.model.d_model
    chunks = chunked(config, row.tokens, recipe.train.sequence_chunks)
    share = max(chunk.stop - chunk.start for chunk in chunks) / row.tokens
    mlp, rest = _mlp(config, matrix), _bdlru(config, matrix) + _slot_memory(config, row, matrix)
    workspace = _workspace(config, row, share)
    if layer == config.attention_layer:
        rest += _attention(width, row.tokens, matrix)
    if layer in config.decoder_inject_layers:
        rest += _injection(config, row, matrix) - 2 * matrix * width * row.encoder_tokens / row.tokens
    if recipe.train.activation_checkpointing == "selective":
        rest -= _products_used(config, layer, matrix)
        mlp -= 2 * matrix * _hidden(config)
        workspace -= _mlp_products(config, matrix)
    # The slot memory's workspace comes when the MLP is done with.
    total = share * (rest + max(mlp, workspace))
    if layer == config.attention_layer and share < 1:
        total += 2 * matrix * width  # keys and values of all chunks side by side
    states = 0
    if config.slots.thread_layers and config.decoder_layers > 1:
        # Gradients of the memories at the ends of all segments, from the layer above, and of one that comes and goes.
        states = -(-row.tokens // config.slots.segment_len) + 1
    residual = 2 * FLOAT * width  # gradients of what enters and leaves the layer
    return total + residual + states * slot_state(config) / row.tokens


def _products(config: ModelConfig, layer: int, matrix: int) -> float:
    """Outputs of a decoder layer's matrix products and attention; addresses and gates are float32."""
    slots, width, heads = config.slots, config.d_model, config.n_heads
    numbers = 2 * width + width * (3 + 3 * slots.householder_steps) + slots.householder_steps * heads
    if layer == config.attention_layer:
        numbers += 5 * width
    if layer in config.decoder_inject_layers:
        numbers += width + slots.top_k * (5 * width + 2 * heads)
    addresses = 2 * heads * slots.factors * slots.factor_size
    float32 = addresses + width * (config.bdlru.block_size + 1)
    return matrix * numbers + FLOAT * float32 + _mlp_products(config, matrix)


def _mlp_products(config: ModelConfig, matrix: int) -> float:
    hidden = _hidden(config)
    return matrix * (2 * hidden + config.d_model) if hidden else 0


def _products_used(config: ModelConfig, layer: int, matrix: int) -> float:
    """Of `_products` those of what comes before the MLP that autograd keeps as they are anyway: all but the gates'
    logits and the outputs added to the residual stream."""
    outputs = 3 if layer == config.attention_layer else 2
    unused = matrix * outputs * config.d_model + FLOAT * config.d_model * (config.bdlru.block_size + 1)
    return _products(config, layer, matrix) - _mlp_products(config, matrix) - unused


def _encoder_layer(config: ModelConfig, length: int, matrix: int) -> float:
    """The largest, per encoder token."""
    mixers = []
    if config.encoder_attn_layers:
        mixers.append(_attention(config.d_model, length, matrix))
    if len(config.encoder_attn_layers) < config.encoder_layers:
        mixers.append(_bidirectional_mamba2(config, length, matrix))
    return max(mixers) + _mlp(config, matrix)


def _encoder_products(config: ModelConfig, matrix: int) -> float:
    """Outputs of all matrix products and attention, per encoder token."""
    width, ssm = config.d_model, config.ssm
    inner = ssm.expand * width
    mamba = 2 * (2 * inner + 2 * ssm.state_size + inner // ssm.head_dim + width)
    attentive = len(config.encoder_attn_layers)
    mixers = matrix * ((config.encoder_layers - attentive) * mamba + attentive * 5 * width)
    return mixers + config.encoder_layers * _mlp_products(config, matrix)


def _output(config: ModelConfig, row: RowShape) -> float:
    """The final norm's input, on a CPU also what it divides, and what it gives labelled positions."""
    return (2 + row.labelled) * FLOAT * config.d_model


def slot_state(config: ModelConfig) -> int:
    """One layer's slot memory of one sequence: S_k, S_v, z and surprise of all slots of all heads, float32."""
    return FLOAT * config.n_heads * config.slots.num_slots * (2 * config.head_dim + 2)


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
    hidden = _hidden(config)
    return _entry(config.d_model, matrix) + 4 * matrix * hidden if hidden else 0


def _hidden(config: ModelConfig) -> int:
    return -(-round(config.mlp_ratio * config.d_model) // 8) * 8


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


def _workspace(config: ModelConfig, row: RowShape, share: float) -> float:
    """In one slot layer's backward pass: gradients of the states, their adjoints, and each write's share of the
    gradients of k, u_k and u_v; of a segment at a time, or of the share of the row that is a chunk, given by token of
    the row (of the chunk)."""
    length = min(config.slots.segment_len, row.tokens * share) if config.segmented else row.tokens * share
    active, steps = config.slots.top_k, config.slots.householder_steps
    return FLOAT * config.d_model * active * (4 + 3 * steps) * length / (row.tokens * share)


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
