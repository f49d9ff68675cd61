"""Kronecker addressing against all p^U products, written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slotmamba_kernels import kronecker_topk
from tests.seeds import seed_afresh

SIZES = [(factors, size) for factors in range(1, 6) for size in range(2, 6) if size**factors <= 3125]


def all_products(logits: Tensor) -> Tensor:
    """Weights [..., p^U] of all slots in the order of their indices, the last factor's digit running fastest."""
    factors, size = logits.shape[-2:]
    probabilities = logits.softmax(-1)
    weights = []
    for digits in itertools.product(range(size), repeat=factors):
        weights.append(torch.stack([probabilities[..., u, digit] for u, digit in enumerate(digits)], -1).prod(-1))
    return torch.stack(weights, -1)


@pytest.mark.parametrize(("factors", "size"), SIZES)
def test_equals_the_largest_of_all_products(factors: int, size: int) -> None:
    """For every k up to 40, then some, up to all slots."""
    seed_afresh()
    logits = 2 * torch.randn(3, 2, factors, size, dtype=torch.float64)
    products = all_products(logits)
    slots = size**factors
    for k in {*range(1, min(slots, 40) + 1), slots // 2, slots - 1, slots} - {0}:
        indices, weights = kronecker_topk(logits, k)
        expected = products.topk(k, -1)
        assert indices.dtype == torch.int32 and weights.dtype == torch.float64
        assert indices.shape == weights.shape == (3, 2, k)
        # Weights of random numbers have no ties, so the slots are the same ones in the same order.
        assert torch.equal(indices.long(), expected.indices)
        torch.testing.assert_close(weights, expected.values, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("factors", "size", "k"), [(1, 5, 3), (2, 3, 9), (3, 4, 7), (5, 2, 8), (5, 4, 8)])
def test_gradient_equals_that_of_the_kept_products(factors: int, size: int, k: int) -> None:
    seed_afresh()
    logits = torch.randn(4, factors, size, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, k, dtype=torch.float64)
    indices, weights = kronecker_topk(logits, k)
    (got,) = torch.autograd.grad((weights * upstream).sum(), logits)
    kept = all_products(logits).gather(-1, indices.long())
    (want,) = torch.autograd.grad((kept * upstream).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: kronecker_topk(x, k)[1], logits)


def test_weights_are_not_renormalised() -> None:
    seed_afresh()
    logits = torch.randn(100, 5, 4)
    _, weights = kronecker_topk(logits, 8)
    total = weights.sum(-1)
    assert (weights > 0).all() and (total < 0.9).any() and (total <= 1).all()
    _, everything = kronecker_topk(logits, 4**5)
    torch.testing.assert_close(everything.sum(-1), torch.ones(100))


def test_flat_addressing_is_a_softmax() -> None:
    seed_afresh()
    logits = torch.randn(7, 1, 30)
    indices, weights = kronecker_topk(logits, 5)
    expected = logits[:, 0].softmax(-1).topk(5, -1)
    assert torch.equal(indices.long(), expected.indices)
    torch.testing.assert_close(weights, expected.values)


def test_digits_of_an_index_belong_to_factors_from_the_first_to_the_last() -> None:
    logits = torch.full((3, 4), -20.0)
    for factor, digit in enumerate((2, 0, 3)):
        logits[factor, digit] = 0.0
    indices, weights = kronecker_topk(logits, 1)
    assert indices.tolist() == [2 * 16 + 0 * 4 + 3]
    torch.testing.assert_close(weights, torch.ones(1))


@pytest.mark.parametrize("logits", [torch.zeros(2, 5, 4), torch.tensor([[1.0, 1.0, 0.0]] * 3)], ids=["uniform", "ties"])
@pytest.mark.parametrize("k", [1, 8, 20])
def test_indices_are_distinct_among_equal_weights(logits: Tensor, k: int) -> None:
    indices, weights = kronecker_topk(logits, k)
    assert all(len(set(row)) == k for row in indices.view(-1, k).tolist())
    torch.testing.assert_close(weights, all_products(logits).topk(k, -1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    seed_afresh()
    logits = torch.randn(50, 5, 4).to(dtype).requires_grad_()
    indices, weights = kronecker_topk(logits, 8)
    expected_indices, expected = kronecker_topk(logits.detach().float(), 8)
    assert weights.dtype == torch.float32 and torch.equal(weights, expected) and torch.equal(indices, expected_indices)
    exact = all_products(logits.detach().double()).gather(-1, indices.long())
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    assert gradient.dtype == dtype and gradient.any()


def test_extreme_logits_are_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [0.0, -1e4]], requires_grad=True)
    indices, weights = kronecker_topk(logits, 4)
    assert weights.isfinite().all() and indices[0] == 0 and weights[0] == 1
    assert torch.autograd.grad(weights.sum(), logits)[0].isfinite().all()


def test_a_million_slots() -> None:
    """4^10 slots, the most that recipes allow: only the beam is ever in memory."""
    seed_afresh()
    logits = torch.randn(64, 10, 4, dtype=torch.float64)
    indices, weights = kronecker_topk(logits, 8)
    assert int(indices.min()) >= 0 and int(indices.max()) < 4**10
    digits = torch.stack([indices.long() // 4**power % 4 for power in range(9, -1, -1)], -1)
    each = logits.softmax(-1).unsqueeze(1).expand(-1, 8, -1, -1).gather(-1, digits.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(weights, each.prod(-1), rtol=1e-10, atol=0)
    # The heaviest slot has the heaviest entry of each factor; the next swaps one entry for the next best.
    ranked = logits.softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(weights[:, 0], ranked[:, :, 0].prod(-1), rtol=1e-10, atol=0)
    swap = (ranked[:, :, 1] / ranked[:, :, 0]).amax(-1)
    torch.testing.assert_close(weights[:, 1], weights[:, 0] * swap, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ((4,), 1, r"logits have shape \(4,\), expected"),
        ((2, 3), 0, r"k=0 is not between 1 and the 3\^2 = 9 slots"),
        ((2, 3), 10, r"k=10 is not between 1 and the 3\^2 = 9 slots"),
        ((2, 3), -1, "k=-1"),
    ],
)
def test_wrong_arguments_are_refused(shape: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kronecker_topk(torch.zeros(shape), k)
