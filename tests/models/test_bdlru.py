"""The BD-LRU layer: steps, documents, padding, and what it starts as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slotmamba.models.bdlru import BDLRU, LONGEST_MEMORY, SHORTEST_MEMORY


def _layer(d_model: int = 16, block_size: int = 4, dtype: torch.dtype = torch.float64) -> BDLRU:
    torch.manual_seed(0)
    return BDLRU(d_model, block_size).to(dtype)


def test_layer_is_the_equation() -> None:
    layer = _layer(d_model=6, block_size=3)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    state = torch.randn(1, 6, dtype=torch.float64)
    h = state[0].clone()
    expected = []
    for x_t in x[0]:
        v = layer.v_proj.weight @ x_t
        logits = (layer.gate_proj.weight @ x_t + layer.gate_proj.bias).view(2, 3, 4)
        previous = h
        h = torch.empty(6, dtype=torch.float64)
        for channel in range(6):
            block, row = divmod(channel, 3)
            gates = logits[block, row].exp() / logits[block, row].exp().sum()
            h[channel] = gates[:3] @ previous[3 * block : 3 * block + 3] + gates[3] * v[channel]
        expected.append(layer.out_proj.weight @ h)
    y, leaving = layer(x, state)
    torch.testing.assert_close(y[0], torch.stack(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(leaving[0], h, rtol=0, atol=1e-12)


def test_steps_equal_forward() -> None:
    layer = _layer(dtype=torch.float32)
    x = torch.randn(3, 40, 16)
    y, leaving = layer(x)
    state = layer.init_state(3)
    for t in range(40):
        y_t, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y_t, y[:, t], rtol=0, atol=1e-5)
    torch.testing.assert_close(state, leaving, rtol=0, atol=1e-5)


def test_packed_documents_equal_documents_alone() -> None:
    layer = _layer()
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    packed, _ = layer(x, doc_start=torch.tensor([[0] * 4 + [4] * 7]))
    alone = torch.cat([layer(x[:, :4])[0], layer(x[:, 4:])[0]], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_padding_anywhere_leaves_the_state_as_it_is() -> None:
    layer = _layer()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    state = torch.randn(2, 16, dtype=torch.float64)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, [0, 1, 5, 11]] = False
    y, leaving = layer(x, state, valid=valid)
    for row in range(2):
        alone, end = layer(x[row : row + 1, valid[row]], state[row : row + 1])
        torch.testing.assert_close(y[row, valid[row]], alone[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(leaving[row], end[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
def test_starts_with_memories_from_short_to_long(block_size: int) -> None:
    layer = _layer(d_model=64, block_size=block_size)
    blocks = 64 // block_size
    gates = layer._gates(torch.zeros(1, 1, 64, dtype=torch.float64))[0, 0]
    matrices = gates[..., :-1]
    # The slowest mode of each block: the time constant that the docstring promises.
    tau = 1 / (1 - torch.linalg.eigvals(matrices).abs().amax(-1))
    assert torch.all(tau[1:] > tau[:-1])
    ratio = (LONGEST_MEMORY / SHORTEST_MEMORY) ** (0.5 / blocks)
    # The bias is drawn up in float64 and kept in float32: 1e-7 of a gate next to 1, times tau.
    torch.testing.assert_close(
        tau[[0, -1]].tolist(), [SHORTEST_MEMORY * ratio, LONGEST_MEMORY / ratio], rtol=1e-4, atol=0
    )
    slow = matrices[-1]
    off_diagonal = slow - slow.diagonal().diag()
    assert slow.diagonal().min() > 0.9 and off_diagonal.max() < 0.05


def test_gates_are_computed_in_float32_under_autocast() -> None:
    layer = _layer(dtype=torch.float32)
    x = torch.randn(2, 30, 16)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        gates = layer._gates(x)
        y, state = layer(x)
    assert gates.dtype == torch.float32 and torch.equal(gates, layer._gates(x))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    # Two products in bfloat16 (8 bits) of numbers below about 1.
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=2e-2)


def test_every_parameter_gets_a_gradient_and_gates_are_not_decayed() -> None:
    layer = _layer()
    layer(torch.randn(2, 9, 16, dtype=torch.float64))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter.grad, Tensor) and parameter.grad.abs().max() > 0, name
    undecayed = {n for n, p in layer.named_parameters() if p.ndim < 2 or getattr(p, "no_weight_decay", False)}
    assert undecayed == {"gate_proj.weight", "gate_proj.bias"}


def test_width_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="d_model=10 is not divisible by block_size=4"):
        BDLRU(10, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: TF32")
def test_gates_under_autocast_are_better_than_bfloat16() -> None:
    """Logits and all gradients against float64: TF32 rounds inputs by 2^-11 at most, bfloat16 by 2^-9."""
    layer = _layer(64, 4, torch.float32).cuda().gate_proj
    x = torch.randn(4, 33, 64, device="cuda", requires_grad=True)
    weights = torch.randn(4, 33, 320, device="cuda")
    leaves = (x, layer.weight, layer.bias)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    got = (y, *torch.autograd.grad((y * weights).sum(), leaves))
    exact = torch.nn.functional.linear(*(each.double() for each in leaves))
    want = (exact, *torch.autograd.grad((exact * weights).sum(), leaves))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm()) <= 2**-11 * float(theirs.norm())
    assert torch.get_float32_matmul_precision() == "highest"
