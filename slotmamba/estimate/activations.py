"""Bytes of activations, by part and by what the backward pass recomputes.

They are what autograd keeps of one micro-batch for the backward pass (`LayerBytes`), and the largest thing that the
backward pass adds while all of that is still there: a block of logits, the workspace of one slot layer, or the layer
(the chunk of one) that it recomputes.
"""

from __future__ import annotations

from slotmamba.config.schema import Recipe
from slotmamba.estimate.layers import FLOAT, LayerBytes, slot_memory
from slotmamba.estimate.row import row_shape
from slotmamba.models.recompute import chunked

WORKSPACE = "backward workspace"


def layer_bytes(recipe: Recipe) -> LayerBytes:
    """Of the recipe's rows, in its precision, on its device: `auto` is a GPU that runs the Triton kernels."""
    matrix = 2 if recipe.train.precision == "bf16" else FLOAT
    return LayerBytes(recipe.model, row_shape(recipe), matrix, gpu=recipe.train.device != "cpu")


def activations(recipe: Recipe) -> dict[str, float]:
    """Bytes of a micro-batch by part.

    The backward workspace is the largest of a block of logits and a slot layer's backward pass or a recomputed layer.
    """
    layers = layer_bytes(recipe)
    tokens = layers.row.tokens * recipe.train.micro_batch
    per_token = _recomputed(recipe, layers) if recomputes(recipe) else _kept(layers)
    parts = {name: number * tokens for name, number in per_token.items() if number}
    parts[WORKSPACE] = max(parts.get(WORKSPACE, 0.0), layers.logits(layers.row.labelled * tokens))
    return parts


def recomputes(recipe: Recipe) -> bool:
    """Whether decoder layers are recomputed in the backward pass."""
    return recipe.train.activation_checkpointing != "none" or recipe.train.sequence_chunks > 1


def _kept(layers: LayerBytes) -> dict[str, float]:
    """Bytes per decoder token by part where nothing is recomputed."""
    config, row = layers.config, layers.row
    count = config.decoder_layers
    parts = {f"encoder {name}": number * _share(layers) for name, number in layers.encoder().items()}
    if config.attention_layer is not None:
        parts["attention"] = layers.attention(row.tokens)
    parts["BD-LRU"] = count * layers.bdlru()
    parts["slot memory"] = count * layers.slot_memory() + layers.mixed_memories()
    parts["injection"] = len(config.decoder_inject_layers) * layers.injection()
    parts["MLP"] = count * layers.mlp()
    # The highest layer's MLP is done with when its slot memory has its turn.
    return parts | {"output": layers.output(), WORKSPACE: max(0.0, layers.workspace(1) - layers.mlp())}


def _recomputed(recipe: Recipe, layers: LayerBytes) -> dict[str, float]:
    """Bytes per decoder token by part where layers are recomputed, a chunk of one layer at a time."""
    config, mode = recipe.model, recipe.train.activation_checkpointing
    width, share = config.d_model, _share(layers)
    parts = {"layer inputs": float(FLOAT * width * config.decoder_layers)}
    largest, products = 0.0, 0.0
    for layer in reversed(range(config.decoder_layers)):
        # By then the backward pass has freed the products of the layers above.
        largest = max(largest, _recomputed_layer(recipe, layers, layer) - products)
        products += _products(layers, layer) if mode == "selective" else 0
    if mode == "none":
        parts |= {f"encoder {name}": number * share for name, number in layers.encoder().items()}
    elif config.encoder_layers:
        parts["layer inputs"] += FLOAT * width * config.encoder_layers * share
        largest = max(largest, share * layers.encoder_layer() - products)
    if mode == "selective":
        parts["matrix products"] = products + share * _encoder_products(layers)
    # Made once for all chunks, so not recomputed with them.
    parts["encoder keys and values"] = len(config.decoder_inject_layers) * 2 * layers.matrix * width * share
    if config.attention_layer is not None and recipe.train.sequence_chunks > 1:
        parts["attention keys and values"] = 2 * layers.matrix * width
    return parts | {"output": layers.output(), WORKSPACE: largest}


def _share(layers: LayerBytes) -> float:
    """Encoder tokens for each of the decoder's."""
    return layers.row.encoder_tokens / layers.row.tokens


def _recomputed_layer(recipe: Recipe, layers: LayerBytes, layer: int) -> float:
    """What a decoder layer makes again of its longest chunk and adds in its backward pass, by token of the row."""
    config, row, width = recipe.model, layers.row, recipe.model.d_model
    chunks = chunked(config, row.tokens, recipe.train.sequence_chunks)
    share = max(chunk.stop - chunk.start for chunk in chunks) / row.tokens
    mlp, workspace = layers.mlp(), layers.workspace(share)
    rest = layers.bdlru() + layers.slot_memory() + layers.mixed_memories() / config.decoder_layers
    if layer == config.attention_layer:
        rest += layers.attention(row.tokens)
    if layer in config.decoder_inject_layers:
        rest += layers.injection() - 2 * layers.matrix * width * _share(layers)
    if recipe.train.activation_checkpointing == "selective":
        rest -= _products_used(layers, layer)
        mlp -= 2 * layers.matrix * layers.hidden
        workspace -= _mlp_products(layers)
    # The slot memory's workspace comes when the MLP is done with.
    total = share * (rest + max(mlp, workspace))
    if layer == config.attention_layer and share < 1:
        total += 2 * layers.matrix * width  # keys and values of all chunks side by side
    states = 0.0
    if config.slots.thread_layers and config.decoder_layers > 1:
        # Gradients of the memories at the ends of all segments, from the layer above, and of two that come and go.
        states = layers.segment_memories(layer) + 2 * slot_memory(config)
    residual = 2 * FLOAT * width  # gradients of what enters and leaves the layer
    return total + residual + states / row.tokens


def _products(layers: LayerBytes, layer: int) -> float:
    """Outputs of a decoder layer's matrix products and attention; addresses and gates are float32."""
    config = layers.config
    slots, width, heads = config.slots, config.d_model, config.n_heads
    numbers = 2 * width + width * (3 + 3 * slots.householder_steps) + slots.householder_steps * heads
    if layer == config.attention_layer:
        numbers += 5 * width
    if layer in config.decoder_inject_layers:
        numbers += width + slots.top_k * (5 * width + 2 * heads)
    addresses = 2 * heads * slots.factors * slots.factor_size
    float32 = addresses + width * (config.bdlru.block_size + 1)
    return layers.matrix * numbers + FLOAT * float32 + _mlp_products(layers)


def _mlp_products(layers: LayerBytes) -> float:
    return layers.matrix * (2 * layers.hidden + layers.config.d_model) if layers.hidden else 0


def _products_used(layers: LayerBytes, layer: int) -> float:
    """Of `_products` those of what comes before the MLP that autograd keeps as they are anyway: all but the gates'
    logits and the outputs added to the residual stream."""
    config = layers.config
    outputs = 3 if layer == config.attention_layer else 2
    unused = layers.matrix * outputs * config.d_model + FLOAT * config.d_model * (config.bdlru.block_size + 1)
    return _products(layers, layer) - _mlp_products(layers) - unused


def _encoder_products(layers: LayerBytes) -> float:
    """Outputs of all matrix products and attention, per encoder token."""
    config = layers.config
    width, ssm = config.d_model, config.ssm
    inner = ssm.expand * width
    mamba = 2 * (2 * inner + 2 * ssm.state_size + inner // ssm.head_dim + width)
    attentive = len(config.encoder_attn_layers)
    mixers = layers.matrix * ((config.encoder_layers - attentive) * mamba + attentive * 5 * width)
    return mixers + config.encoder_layers * _mlp_products(layers)
