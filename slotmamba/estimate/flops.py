"""Floating-point operations of one forward pass per decoder token, by part, from the layers' definitions.

A multiply-add is two operations; an addition, comparison, division, exponential, logarithm or root is one; moving,
sorting and looking up are none. Symbols: T decoder tokens of a row, S encoder tokens, C = d_model, H heads of d = C/H
channels.

What an implementation does beyond the definition is not counted: sorting, the second sweep of a parallel scan, the
masked half of causal attention, recomputation. The one exception is Mamba-2, whose chunked form is the algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.config.schema import ModelConfig
from slotmamba.estimate.row import RowShape

NORM = 4  # RMSNorm of a channel: square, add, scale, weight
UNIT = 3  # the same without weight
SIGMOID = 3  # negate and exponential as one, add, divide
SILU = 4
SOFTMAX = 3  # exponential, add, divide


@dataclass(frozen=True)
class Flops:
    """Operations: those of matrix products, and all others."""

    matmul: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(self.matmul + more.matmul, self.other + more.other)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.matmul * times, self.other * times)


def forward_flops(config: ModelConfig, row: RowShape) -> dict[str, Flops]:
    """Operations per decoder token by part; parts of the slot memory are named ``slot memory: write`` and so on.

    The encoder's are those of its S tokens divided by T.
    """
    width, layers = config.d_model, config.decoder_layers
    parts = {
        f"encoder {name}": each * (row.encoder_tokens / row.tokens) for name, each in _encoder(config, row).items()
    }
    if config.attention_layer is not None:
        parts["attention"] = attention(width, config.n_heads, (row.tokens + 1) / 2)
    parts["BD-LRU"] = bdlru(width, config.bdlru.block_size) * layers
    parts |= {f"slot memory: {name}": each for name, each in slot_memory(config, row).items()}
    if config.decoder_inject_layers:
        parts["injection"] = injection(config, row) * len(config.decoder_inject_layers)
    if config.mlp_ratio:
        parts["MLP"] = swiglu(config) * layers
    parts["norms"] = _norms(config, row)
    # Loss: softmax over the vocabulary.
    parts["output"] = Flops(2 * width * config.vocab_size, SOFTMAX * config.vocab_size) * row.labelled
    return parts


def _encoder(config: ModelConfig, row: RowShape) -> dict[str, Flops]:
    """Per encoder token."""
    attentive = len(config.encoder_attn_layers)
    parts = {}
    if config.encoder_layers > attentive:
        parts["Mamba-2"] = bidirectional_mamba2(config, row.encoder_tokens) * (config.encoder_layers - attentive)
    if attentive:
        parts["attention"] = attention(config.d_model, config.n_heads, row.encoder_tokens) * attentive
    if config.encoder_layers and config.mlp_ratio:
        parts["MLP"] = swiglu(config) * config.encoder_layers
    return parts


def attention(width: int, heads: int, seen: float) -> Flops:
    """A token that attends to ``seen`` tokens: four C x C projections (8 C^2), scores and values (4 C each seen token),
    rotation of q and k (2 multiplications and an addition a channel), softmax."""
    return Flops(8 * width**2 + 4 * width * seen, 6 * width + SOFTMAX * heads * seen)


def bdlru(width: int, m: int) -> Flops:
    """Projections of v and out (4 C^2) and of the m+1 gates a channel (2 C^2 (m+1)); their bias and softmax; the
    recurrence: m multiply-adds and that of the input a channel."""
    return Flops(4 * width**2 + 2 * width**2 * (m + 1), width * (m + 1) * (1 + SOFTMAX) + width * (2 * m + 2))


def swiglu(config: ModelConfig) -> Flops:
    hidden = -(-round(config.mlp_ratio * config.d_model) // 8) * 8
    return Flops(6 * config.d_model * hidden, (SILU + 1) * hidden)


def bidirectional_mamba2(config: ModelConfig, length: int) -> Flops:
    """Two mixers per token, W = expand*C inner channels in h heads of P, N states, chunks of L tokens.

    Projections 2C(2W + 2N + h) + 2WC. The chunked scan multiplies matrices: scores within a chunk 2LN (shared by the
    heads), scores with inputs 2LW, chunk states 2WN, their read-out 2WN. Others: the convolution, decays of a chunk's
    token pairs (3Lh), scaling of inputs, states and outputs, skip, gate and norm.
    """
    ssm, width = config.ssm, config.d_model
    inner, states = ssm.expand * width, ssm.state_size
    heads, size = inner // ssm.head_dim, min(ssm.chunk_size, length)
    padding = -(-length // size) * size / length
    convolved = inner + 2 * states
    projections = 2 * width * (inner + convolved + heads) + 2 * inner * width
    scan = Flops(
        2 * size * states + 2 * size * inner + 4 * inner * states,
        3 * size * heads + 4 * inner + 2 * inner * states / size,
    )
    elementwise = (2 * ssm.conv_size + SILU) * convolved + 5 * heads + (2 + SILU + 1 + NORM) * inner
    return (Flops(projections, elementwise) + scan * padding) * 2 + Flops(other=width)


def slot_memory(config: ModelConfig, row: RowShape) -> dict[str, Flops]:
    """All slot memory layers, per token. K active slots, n Householder steps, U factors of p entries, M = p^U slots.

    projections: matrices q, gate, out 6 C^2; k, u_k, u_v of n steps 6 n C^2; beta 2 n C H. Others: norms of q, k, u_k
        and of the output, beta's sigmoid, the output gate.
    addresses: matrices of the write and the read address 4 C H U p. Others, a head: the write's convolution over a taps
        2 a U p; for each of the two the temperature, log-softmax and balance term 8 U p; beam merging, one addition and
        one comparison a candidate, where factor u has min(K, p^(u-1)) p candidates (no addition for the first factor,
        no comparison where all are kept); K exponentials.
    write: a head and active slot: decay and normaliser 6, decay of S_k and S_v 2d, and a step: k.S of both 4d, then
        S + w beta (u - k (k.S)) of both 8d, and 3 for the sizes. In all K H (6 + 2d + n (12d + 3)).
    surprise (threaded models; not in the last segment, after which nobody asks for it): a head: the mean of what is
        written 4 n d, and n + 2d; an active slot: contents, differences, squares, sums of S_k and S_v 8d, mixing and
        averaging 9.
    read: a head and read slot: q.S_k and p S_v 4d; scaling, log w, softmax 10.
    threading: a boundary of segments, a head and slot, in all layers but the lowest: the gate 7, the mix of 2d + 2
        numbers 3 each; a row of T tokens has ceil(T / segment_len) - 1 boundaries.
    """
    slots, width, heads = config.slots, config.d_model, config.n_heads
    active, steps, dim, layers = slots.top_k, slots.householder_steps, config.head_dim, config.decoder_layers
    entries = slots.factors * slots.factor_size
    convolution = 2 * slots.address_conv * entries if slots.address_conv > 1 else 0
    addressing = convolution + 2 * (8 * entries + _merging(slots.factors, slots.factor_size, active) + active)
    parts = {
        "projections": Flops(
            6 * width**2 + 6 * steps * width**2 + 2 * steps * width * heads,
            UNIT * width * (1 + 2 * steps) + (SIGMOID + 2) * steps * heads + (NORM + SILU + 1) * width,
        ),
        "addresses": Flops(4 * width * heads * entries, heads * addressing),
        "write": Flops(other=heads * active * (6 + 2 * dim + steps * (12 * dim + 3))),
        "read": Flops(heads * active * 4 * dim, heads * active * 10),
    }
    if slots.thread_layers and layers > 1:
        boundaries = -(-row.tokens // slots.segment_len) - 1
        mixing = boundaries * heads * slots.num_slots * (7 + 3 * (2 * dim + 2)) / row.tokens
        surprise = Flops(heads * 4 * steps * dim, heads * (steps + 2 * dim + active * (8 * dim + 9)))
        before_last = boundaries * slots.segment_len / row.tokens
        parts |= {"surprise": surprise * before_last, "threading": Flops(other=mixing) * ((layers - 1) / layers)}
    return {name: each * layers for name, each in parts.items()}


def _merging(factors: int, size: int, active: int) -> int:
    """Additions and comparisons of finding the top K of p^U products."""
    operations, kept = 0, 1
    for factor in range(factors):
        candidates = kept * size
        operations += (candidates if factor else 0) + (candidates if candidates > active else 0)
        kept = min(active, candidates)
    return operations


def injection(config: ModelConfig, row: RowShape) -> Flops:
    """One layer, per decoder token with K active slots: the query's three projections (2 C^2 from the hidden state,
    2 C d a slot from its content and 2 C d from its embedding), those of c_k and c_v (2 C d a slot each), two gates
    (4 C a slot each), attention to S encoder tokens (4 S C a slot), whose keys and values are projected once (4 C^2
    each). Others: contents, embeddings of U digits, sums, softmax, gates, and the write's last line, 6 C a slot.
    """
    width, heads, active, seen = config.d_model, config.n_heads, config.slots.top_k, row.encoder_tokens
    projections = 2 * width**2 + active * (8 * width * config.head_dim + 8 * width)
    keys_and_values = 4 * width**2 * seen / row.tokens
    elementwise = active * width * (config.slots.factors + 10) + active * heads * (SOFTMAX * seen + 12)
    return Flops(projections + keys_and_values + 4 * active * seen * width, elementwise)


def _norms(config: ModelConfig, row: RowShape) -> Flops:
    """The norm before each sublayer and the sum after it, and the final norms."""
    mlps = 1 if config.mlp_ratio else 0
    decoder = config.decoder_layers * (2 + mlps) + (config.attention_layer is not None)
    encoder = config.encoder_layers * (1 + mlps)
    per_token: float = decoder * (NORM + 1) + NORM
    if encoder:
        per_token += (encoder * (NORM + 1) + NORM) * row.encoder_tokens / row.tokens
    return Flops(other=per_token * config.d_model)
