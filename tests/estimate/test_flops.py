"""Floating-point operations against PyTorch's own counter and against scalars that count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slotmamba.config.schema import ModelConfig
from slotmamba.estimate.flops import _merging, forward_flops, slot_memory
from slotmamba.estimate.row import RowShape
from slotmamba.models import build_model
from tests.estimate.recipes import ENCODER, SLOTS, TINY


def test_flops_of_a_tiny_model_by_hand() -> None:
    """C=8, H=2, d=4; U=2, p=3, K=2, n=2, M=9; BD-LRU blocks of 2; MLP of 16; 16 tokens of vocabulary; rows of 12."""
    found = forward_flops(
        ModelConfig.model_validate(TINY), RowShape(tokens=12, encoder_tokens=0, labelled=0.5, padded=False)
    )
    matmul = {name: flops.matmul for name, flops in found.items()}
    assert matmul == {
        # q, k, v, out 4 * 8*8 multiply-adds; a token sees 6.5 tokens on average, 8 multiply-adds twice.
        "attention": 2 * 4 * 64 + 2 * 2 * 8 * 6.5,
        # Two layers: v and out 8x8, gates 8x24.
        "BD-LRU": 2 * 2 * (64 + 64 + 192),
        # q, gate, out 8x8; k, u_k, u_v 8x16; beta 8x4.
        "slot memory: projections": 2 * 2 * (3 * 64 + 3 * 128 + 32),
        # Two matrices of 8x12.
        "slot memory: addresses": 2 * 2 * (2 * 96),
        "slot memory: write": 0,
        # Two heads, two slots, four channels, keys and values.
        "slot memory: read": 2 * 2 * (2 * 2 * 4 * 2),
        # Two heads, two steps, four channels, keys and values; in two of three segments.
        "slot memory: surprise": pytest.approx(2 * 2 * (2 * 2 * 4 * 2) * 8 / 12),
        "slot memory: threading": 0,
        # Three matrices of 8x16 in two layers.
        "MLP": 2 * 2 * 3 * 128,
        "norms": 0,
        # Half of the positions.
        "output": 2 * 8 * 16 / 2,
    }
    other = {name: flops.other for name, flops in found.items()}
    # Rotation of q and k; softmax of two heads.
    assert other["attention"] == 3 * 16 + 3 * 2 * 6.5
    # 24 gates: bias and softmax; 8 channels: two multiply-adds of the state, one of the input.
    assert other["BD-LRU"] == 2 * (24 * 4 + 8 * 6)
    # Norms of q (8), k and u_k (16 each), 3 a channel; 4 betas: bias, sigmoid, doubling; the output's norm and gate.
    assert other["slot memory: projections"] == 2 * (3 * 40 + 5 * 4 + 4 * 8 + 5 * 8)
    # A head has 6 entries. Convolution of 3 taps; two addresses: 8 an entry, the first factor's 3 entries compared, as
    # K=2, the second's 6 candidates added and compared, 2 exponentials.
    assert other["slot memory: addresses"] == 2 * 2 * (2 * 3 * 6 + 2 * (8 * 6 + 3 + 6 + 6 + 2))
    # Three norms in one layer, four in that with attention, 4 a channel each, and a sum after each; the last norm.
    assert other["norms"] == (4 + 3) * 5 * 8 + 4 * 8
    assert other["MLP"] == 2 * 5 * 16
    assert other["output"] == 3 * 16 / 2


class Counted:
    """A number that counts the operations made with it."""

    operations = 0

    def _counted(self, *others: object) -> Counted:
        Counted.operations += 1
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _counted
    minimum = maximum = log = log1p = exp = _counted

    def sigmoid(self) -> Counted:
        return 1 / (1 + self.exp())


def operations(function: Any, *sizes: int) -> int:
    Counted.operations = 0
    function(*sizes)
    return Counted.operations


def write(dim: int, steps: int) -> None:
    """hksa.md section 2 for one slot, number by number."""
    x = Counted()
    w, z, memory = x, x, [[x] * dim, [x] * dim]
    a = (x * w.minimum(0.999).log1p()).exp()
    z = a * z + w
    memory = [[a * s for s in vector] for vector in memory]
    for _ in range(steps):
        size = w * x  # w beta
        for which, vector in enumerate(memory):
            along: Any = x  # a dot product of d channels counts as d multiply-adds
            for s in vector:
                along = along + x * s
            along = size * along
            memory[which] = [s + size * x - along * x for s in vector]


def surprise_of_a_token(dim: int, steps: int) -> None:
    x = Counted()
    total: Any = x
    for _ in range(steps):
        total = total + x
    for _ in range(2 * dim):
        _ = total / total


def surprise_of_a_slot(dim: int) -> None:
    """a_s, 1 - a_s and 1 - eta are a head's, not a token's."""
    x = Counted()
    errors = []
    for _ in range(2):
        squares: Any = x
        for _ in range(dim):
            difference = x / x - x
            squares = squares + difference * difference
        errors.append(squares / dim)
    error = x * errors[0] + x * errors[1]
    rate = x * x
    _ = x + rate * (error - x)


def read_of_a_slot() -> None:
    """Beside the two dot products."""
    x = Counted()
    inverse = 1 / x
    score = x * inverse * 0.5 + x.maximum(1e-30).log()
    p = (score.exp() + x) / x
    _ = p * inverse


def hand_over_of_a_slot(dim: int) -> None:
    x = Counted()
    gate = (x + x * (x + 1e-6).log()).sigmoid()
    for _ in range(2 * dim + 2):
        _ = x + gate * (x - x)


@pytest.mark.parametrize(("heads", "dim", "active", "steps"), [(2, 4, 2, 2), (1, 6, 3, 1), (3, 2, 5, 4)])
def test_slot_memory_against_counting_scalars(heads: int, dim: int, active: int, steps: int) -> None:
    slots = SLOTS | {"top_k": active, "householder_steps": steps}
    model = {"d_model": heads * dim, "n_heads": heads, "decoder_layers": 3, "slots": slots}
    config = ModelConfig.model_validate(model | {"bdlru": {"block_size": 1}})
    found = slot_memory(config, RowShape(tokens=10, encoder_tokens=0, labelled=1.0, padded=False))
    layers, boundaries, total_slots = 3, 2, 9
    assert found["write"].other == layers * heads * active * operations(write, dim, steps)
    assert found["read"].other == layers * heads * active * operations(read_of_a_slot)
    surprise = operations(surprise_of_a_token, dim, steps) + active * operations(surprise_of_a_slot, dim)
    assert found["surprise"].other == pytest.approx(layers * heads * surprise * 8 / 10, rel=1e-12)  # 2 of 3 segments
    hand_over = boundaries * heads * total_slots * operations(hand_over_of_a_slot, dim)
    assert found["threading"].other == pytest.approx((layers - 1) * hand_over / 10, rel=1e-12)


def test_merging_counts_candidates() -> None:
    # 3 entries, all kept; 9 sums, the best 8 selected; 24 sums, selected.
    assert _merging(factors=3, size=3, active=8) == 9 + 9 + 24 + 24
    # Flat: one comparison a slot.
    assert _merging(factors=1, size=100, active=8) == 100


def counted_by_pytorch(model: torch.nn.Module, *inputs: Tensor) -> int:
    # The counter does not know the CPU's fused attention, but the matrix products that it stands for.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*inputs)
    # The short convolutions of Mamba-2 are convolutions to the counter; here they are no matrix products.
    convolutions = [count for count in counter.get_flop_counts()["Global"].items() if "convolution" in str(count[0])]
    return counter.get_total_flops() - sum(count for _, count in convolutions)


@pytest.mark.parametrize("changes", [{}, {"decoder_attn_layer": None}, {"slots": SLOTS | {"thread_layers": False}}])
def test_matrix_products_against_pytorchs_counter(changes: dict[str, Any]) -> None:
    config = ModelConfig.model_validate(TINY | changes)
    batch, length = 3, 12
    counted = counted_by_pytorch(build_model(config), torch.randint(16, (batch, length)))
    found = forward_flops(config, RowShape(length, 0, labelled=1.0, padded=False))
    expected = sum(flops.matmul for flops in found.values()) * batch * length
    if config.attention_layer is not None:
        # The counter takes all pairs of tokens, we those that causal attention needs.
        expected += batch * 4 * 8 * (length * length - length * (length + 1) // 2)
    assert counted == round(expected)


def test_matrix_products_of_an_encoder_decoder_against_pytorchs_counter() -> None:
    config = ModelConfig.model_validate(TINY | ENCODER | {"decoder_attn_layer": None})
    batch, length, encoder_length = 3, 4, 12  # one segment; keys and values of the encoder are projected once
    inputs = torch.randint(16, (batch, length)), torch.randint(16, (batch, encoder_length))
    found = forward_flops(config, RowShape(length, encoder_length, labelled=1.0, padded=False))
    expected = sum(flops.matmul for flops in found.values()) * batch * length
    assert counted_by_pytorch(build_model(config), *inputs) == round(expected)
