"""Bytes that autograd keeps of each sublayer for the backward pass, tensor by tensor as the layers' code makes them.

Per token of the decoder's row (of the encoder's, for encoder layers), averaged over the row. Left out are vectors much
smaller than a token's hidden state. Under bfloat16 autocast the operands of matrix products are kept in 2 bytes a
number, a copy for each product, while norms, gates and addresses stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotmamba.config.schema import ModelConfig
from slotmamba.estimate.row import RowShape
from slotmamba_kernels.bdlru import TRITON_BLOCK_SIZES
from slotmamba_kernels.cross_entropy.chunked import block_rows
from slotmamba_kernels.hksa import MAX_DIM
from slotmamba_kernels.hksa.state import DENSE_SLOTS, MOST_BUCKETS
from slotmamba_kernels.kronecker import fits_fused

FLOAT, INDEX, INT32 = 4, 8, 4  # bytes of a float32, an int64 and an int32


def slot_memory(config: ModelConfig, rows: int | None = None) -> int:
    """A layer's slot memory of one sequence: S_k, S_v, z and surprise, float32. rows: of a head, all slots' if None."""
    return FLOAT * config.n_heads * (rows or config.slots.num_slots) * (2 * config.head_dim + 2)


@dataclass(frozen=True)
class LayerBytes:
    """matrix: bytes a number of a matrix product; gpu: whether the Triton kernels run, else PyTorch operations."""

    config: ModelConfig
    row: RowShape
    matrix: int
    gpu: bool

    @property
    def hidden(self) -> int:
        """Of the MLP, as `SwiGLU` rounds it."""
        return -(-round(self.config.mlp_ratio * self.config.d_model) // 8) * 8

    @property
    def fused(self) -> bool:
        """Whether the slot memory runs on Triton kernels, which take heads of so many channels."""
        return self.gpu and self.config.head_dim <= MAX_DIM

    def mlp(self) -> float:
        """Gate, its silu, up and their product."""
        return self._entry() + 4 * self.matrix * self.hidden if self.hidden else 0

    def attention(self, seen: int) -> float:
        """q and k before (float32) and after their rotation, v, the output; the mask of documents as bool and
        numbers."""
        width = self.config.d_model
        return self._entry() + 2 * FLOAT * width + 5 * self.matrix * width + (1 + self.matrix) * seen

    def bdlru(self) -> float:
        """v and h, which kernels take in the precision they come in; the gates as softmax leaves them and, where
        there is padding, with it masked."""
        width, gates = self.config.d_model, self.config.d_model * (self.config.bdlru.block_size + 1)
        kept = self._entry(float32=True) + (1 + self.row.padded) * FLOAT * gates
        if self.gpu and self.config.bdlru.block_size in TRITON_BLOCK_SIZES:
            return kept + 2 * self.matrix * width
        return kept + 2 * FLOAT * width + self._rounded(width)

    def slot_memory(self) -> float:
        """Addresses, the vectors q, k, u_k, u_v before and after their norms, what the op keeps, the gated output.

        An address keeps its logits, tap by tap of their convolution and before and after the temperature, and their
        distribution. Norms make float32 of their inputs, but for k's, whose input is divided as it is.
        """
        config, matrix = self.config, self.matrix
        slots, width, heads = config.slots, config.d_model, config.n_heads
        active, steps = slots.top_k, slots.householder_steps
        entries = heads * slots.factors * slots.factor_size
        logits = FLOAT * entries * (slots.address_conv + 6)
        if self.gpu and fits_fused(slots.factors, slots.factor_size, active):
            found = heads * active * (2 * (INT32 + FLOAT) + self.row.padded * FLOAT)  # write weights are masked
        else:
            found = 2 * heads * active * (INDEX * slots.factors + FLOAT)
        output = (2 * FLOAT + 3 * matrix) * width
        kept = self._entry(float32=True) + logits + found + output
        if self.fused:
            vectors = matrix * width * (1 + 3 * steps) + FLOAT * width * (1 + steps) + matrix * width * steps
            return kept + vectors + self._kernels_keep()
        vectors = matrix * width * (1 + 2 * steps) + FLOAT * width * (1 + 3 * steps)
        if matrix < FLOAT:
            vectors += FLOAT * width * (1 + steps)
        states = FLOAT * 2 * width * active + 2 * self._touched_states()
        return kept + vectors + states + heads * active * (7 * INDEX + FLOAT * (20 + 2 * steps))

    def _kernels_keep(self) -> float:
        """Of each write: what the slot held after it in the inputs' precision, its normaliser, the products with keys
        of each step, log-decay, and with threading surprise and errors; of each write and read its places in the plan,
        and of all segments at once those of every slot.
        """
        slots = self.config.slots
        contents = 2 * self.config.head_dim * self.matrix
        surprise = 3 * FLOAT if self._threaded() else 0
        plan = (5 + 3) * INT32  # order, two links, the range and source of a write; order and source of a read
        numbers = contents + FLOAT * (2 + 2 * slots.householder_steps) + surprise + plan
        buckets = 2 * INT32 * slots.num_slots / slots.segment_len if self._at_once() else 0
        return self.config.n_heads * (slots.top_k * numbers + buckets)

    def _at_once(self, layer: int = 0) -> bool:
        """Whether a layer runs through all segments of a row at once, as `hksa_threaded` decides."""
        few = self.config.slots.num_slots <= MOST_BUCKETS and layer not in self.config.decoder_inject_layers
        return self.fused and self._threaded() and few and self.row.tokens >= 2 * self.config.slots.segment_len

    def _threaded(self) -> bool:
        return self.config.slots.thread_layers and self.config.decoder_layers > 1

    def _touched_states(self) -> float:
        """The states of the slots that a segment touches, by token: at most all slots, at most one an event."""
        segment = min(self.config.slots.segment_len, self.row.tokens)
        touched = min(self.config.slots.num_slots, 2 * self.config.slots.top_k * segment)
        return FLOAT * 2 * self.config.d_model * touched / segment

    def segment_memories(self, layer: int) -> int:
        """The slot memories of a layer at the ends of a row's segments, of a sequence: the last's too where the kernels
        run through all at once and it is whole, elsewhere not.

        On a GPU large memories have rows for written slots only: at most all writes of this layer and, by threading, of
        the layers below.
        """
        config, total = self.config, 0
        whole = self.row.tokens % config.slots.segment_len == 0
        for end in range(1, self._segments() + (whole and self._at_once(layer))):
            rows = config.slots.num_slots
            if self.fused and rows > DENSE_SLOTS:
                layers = layer + 1 if self._threaded() else 1
                rows = min(rows, end * config.slots.segment_len * config.slots.top_k * layers)
            total += slot_memory(config, rows)
        return total

    def mixed_memories(self) -> float:
        """The memories from which segments start, by token, of all layers: mixes of the layer's own and the one below.
        The lowest layer has no others than its own, but a copy where the kernels run through all at once."""
        if not (self.fused and self._threaded()):
            return 0.0  # in PyTorch operations they are counted among the touched states
        layers, lowest = self.config.decoder_layers, 0 if self._at_once(0) else 1
        total = sum(map(self.segment_memories, range(lowest, layers)))
        if self._at_once() and self.row.tokens % self.config.slots.segment_len:
            total += (layers - 1) * slot_memory(self.config)  # of the rest, which follows on its own
        return total / self.row.tokens

    def _segments(self) -> int:
        return -(-self.row.tokens // self.config.slots.segment_len) if self.config.segmented else 1

    def workspace(self, share: float) -> float:
        """In one slot layer's backward pass: gradients of the states, their adjoints, and each write's share of the
        gradients of k, u_k and u_v; of a segment at a time, or of the share of the row that is a chunk, given by token
        of the row (of the chunk). On kernels an adjoint of each write, and gradients of the vectors; those of all
        segments put together, old and new sum, or of all at once, with those of the memories of the layer below."""
        config = self.config
        length = self.row.tokens * share
        part = min(config.slots.segment_len, length) if config.segmented else length
        active, steps = config.slots.top_k, config.slots.householder_steps
        if not self.fused:
            return FLOAT * config.d_model * active * (4 + 3 * steps) * part / length
        vectors = self.matrix * config.d_model * (1 + 3 * steps)
        of_writes = config.n_heads * active * (2 * config.head_dim * self.matrix + FLOAT * (4 + 2 * steps))
        if self._at_once():
            return of_writes + vectors + slot_memory(config) / config.slots.segment_len
        return (of_writes + vectors) * part / length + (2 * vectors if part < length else 0)

    def injection(self) -> float:
        """Contents as read and divided, embedding, query, attended vector and its copies, the gates' inputs, and what
        is added to the states; keys and values of the encoder."""
        config, matrix = self.config, self.matrix
        a_slot = config.d_model * (8 * FLOAT + 7 * matrix) + INDEX * config.n_heads * config.slots.factors
        return config.slots.top_k * a_slot + 2 * matrix * config.d_model * self.row.encoder_tokens / self.row.tokens

    def bidirectional_mamba2(self) -> float:
        """Of each direction: the input in order, in_proj's output, the convolution's and its silu; in the scan decays
        and weighted scores of a chunk's token pairs, four forms of the inputs, B and C as they are and for every head,
        and two copies of the chunks' states; the output, its gate, their product, and its norm twice. In PyTorch
        operations on any device."""
        ssm, width, matrix, length = self.config.ssm, self.config.d_model, self.matrix, self.row.encoder_tokens
        inner, states, size = ssm.expand * width, ssm.state_size, min(ssm.chunk_size, length)
        heads, convolved = inner // ssm.head_dim, inner + 2 * states
        padding = -(-length // size) * size / length
        projected = matrix * (width + inner + 3 * convolved + heads) + self._rounded(2 * convolved)
        pairs = 2 * size * heads + size
        scan = FLOAT * padding * (pairs + 4 * inner + 2 * (heads + 1) * states + 2 * inner * states / size)
        output = 3 * matrix * inner + 2 * FLOAT * inner
        return self._entry() + 2 * (projected + scan + output)

    def encoder_layer(self) -> float:
        """The largest of the encoder's layers."""
        config, mixers = self.config, []
        if config.encoder_attn_layers:
            mixers.append(self.attention(self.row.encoder_tokens))
        if len(config.encoder_attn_layers) < config.encoder_layers:
            mixers.append(self.bidirectional_mamba2())
        return max(mixers) + self.mlp()

    def encoder(self) -> dict[str, float]:
        """All layers of the encoder, by part."""
        config = self.config
        if not config.encoder_layers:
            return {}
        attentive = len(config.encoder_attn_layers)
        parts = {
            "Mamba-2": (config.encoder_layers - attentive) * self.bidirectional_mamba2(),
            "attention": attentive * self.attention(self.row.encoder_tokens),
            "MLP": config.encoder_layers * self.mlp(),
        }
        return {name: number for name, number in parts.items() if number}

    def output(self) -> float:
        """The final norm's input, on a CPU also what it divides, and what it gives labelled positions."""
        return ((1 if self.gpu else 2) + self.row.labelled) * FLOAT * self.config.d_model

    def logits(self, labels: float) -> float:
        """The block of logits that exists at a time, which becomes their gradient; under autocast, in PyTorch
        operations, also in float32."""
        rows = min(labels, block_rows(self.config.vocab_size, "cuda"))
        widened = FLOAT if self.matrix < FLOAT and not self.gpu else 0
        return rows * self.config.vocab_size * (self.matrix + widened)

    def _entry(self, float32: bool = False) -> int:
        """What every sublayer begins with: the residual stream, which its norm keeps, and the normed input of matrices:
        under autocast a copy, and the float32 that gates and addresses take."""
        width = self.config.d_model
        if self.matrix == FLOAT:
            return 2 * FLOAT * width
        return FLOAT * width * (1 + float32) + self.matrix * width

    def _rounded(self, numbers: int) -> int:
        """The copies that autocast makes of float32 numbers (or back)."""
        return 0 if self.matrix == FLOAT else self.matrix * numbers
