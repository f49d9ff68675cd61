"""Attention against its equation written out, with documents, padding and a cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slotmamba.models.attention import Attention


def _attention(causal: bool, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(0)
    return Attention(16, n_heads=2, causal=causal).to(dtype)


def _written_out(layer: Attention, x: Tensor, allowed: Tensor) -> Tensor:
    """One row x [T, C]; allowed [T, T]: may token i (row) attend to token j. Rotations as complex numbers."""
    length, width = x.shape
    dim = width // layer.n_heads
    q, k, v = (layer.qkv_proj.weight @ x.T).T.view(length, 3, layer.n_heads, dim).unbind(1)
    rate = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    turn = torch.exp(1j * torch.arange(length)[:, None, None] * rate)
    q, k = (torch.complex(a[..., : dim // 2], a[..., dim // 2 :]) * turn for a in (q, k))
    out = torch.zeros(length, layer.n_heads, dim, dtype=torch.float64)
    for head in range(layer.n_heads):
        for i in range(length):
            scores = torch.stack([(q[i, head] * k[j, head].conj()).real.sum() / math.sqrt(dim) for j in range(length)])
            weights = scores.masked_fill(~allowed[i], -math.inf).softmax(0)
            out[i, head] = weights @ v[:, head]
    return out.view(length, width) @ layer.out_proj.weight.T


@pytest.mark.parametrize("causal", [True, False])
def test_equals_its_equation(causal: bool) -> None:
    layer = _attention(causal)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    allowed = torch.ones(7, 7, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    y = layer(x)
    for row in range(2):
        torch.testing.assert_close(y[row], _written_out(layer, x[row], allowed), rtol=0, atol=1e-12)


def test_packed_documents_equal_documents_alone() -> None:
    layer = _attention(causal=True)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    starts = [[0, 5], [-3, 4, 5]]
    doc_start = torch.tensor([[max(s for s in row if s <= t) for t in range(12)] for row in starts])
    packed = layer(x, doc_start=doc_start)
    for row, spans in enumerate([[(0, 5), (5, 12)], [(0, 4), (4, 5), (5, 12)]]):
        alone = torch.cat([layer(x[row : row + 1, a:b]) for a, b in spans], 1)
        torch.testing.assert_close(packed[row], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [[9, 10, 11], [0, 1, 2]], ids=["at the end", "at the start"])
def test_padding_changes_nothing(causal: bool, padding: list[int]) -> None:
    layer = _attention(causal)
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, padding] = False
    y = layer(x, valid=valid)
    for row in range(2):
        torch.testing.assert_close(y[row, valid[row]], layer(x[row : row + 1, valid[row]])[0], rtol=0, atol=1e-12)
    y[valid].sum().backward()
    assert x.grad is not None and bool((x.grad[~valid] == 0).all())


def test_row_of_padding_only_is_finite() -> None:
    layer = _attention(causal=False)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    y = layer(x, valid=torch.tensor([[True] * 5, [False] * 5]))
    y.sum().backward()
    assert x.grad is not None and bool(y.isfinite().all()) and bool(x.grad.isfinite().all())


def test_documents_with_padding() -> None:
    layer = _attention(causal=True)
    x = torch.randn(1, 10, 16, dtype=torch.float64)
    doc_start = torch.tensor([[0] * 4 + [4] * 6])
    valid = torch.tensor([[True] * 8 + [False] * 2])
    y = layer(x, doc_start=doc_start, valid=valid)[:, :8]
    torch.testing.assert_close(y, torch.cat([layer(x[:, :4]), layer(x[:, 4:8])], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_future_does_not_change_the_past(packed: bool) -> None:
    layer = _attention(causal=True, dtype=torch.float32)
    doc_start = torch.tensor([[0] * 10 + [10] * 40] * 2) if packed else None
    x = torch.randn(2, 50, 16)
    before = layer(x, doc_start=doc_start)
    x[:, 30:] += 1
    after = layer(x, doc_start=doc_start)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_steps_equal_forward_and_leave_their_cache_alone() -> None:
    layer = _attention(causal=True, dtype=torch.float32)
    x = torch.randn(3, 40, 16)
    y = layer(x)
    cache = layer.init_cache(3)
    for t in range(40):
        assert cache.length == t
        again, _ = layer.step(x[:, t] + 1, cache)
        y_t, cache = layer.step(x[:, t], cache)
        torch.testing.assert_close(y_t, y[:, t], rtol=0, atol=1e-5)
        assert not torch.allclose(again, y_t)


def test_bfloat16_autocast() -> None:
    layer = _attention(causal=True, dtype=torch.float32)
    x = torch.randn(2, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        cache = layer.init_cache(2)
        for t in range(20):
            y_t, cache = layer.step(x[:, t], cache)
    assert y.dtype == torch.bfloat16
    # Products in bfloat16 (8 bits) of numbers below about 1.
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=2e-2)
    torch.testing.assert_close(y_t, y[:, -1], rtol=0, atol=2e-2)


def test_every_parameter_gets_a_gradient() -> None:
    layer = _attention(causal=True)
    layer(torch.randn(2, 9, 16, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("d_model", "n_heads"), [(16, 3), (12, 4)])
def test_heads_need_an_even_number_of_channels(d_model: int, n_heads: int) -> None:
    with pytest.raises(ValueError, match="even number of channels"):
        Attention(d_model, n_heads, causal=True)
