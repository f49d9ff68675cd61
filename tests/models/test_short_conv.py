"""The short convolution against its sum written out."""

from __future__ import annotations

import pytest
import torch

from slotmamba.models.short_conv import ShortConv
from tests.models.model_cases import document_starts, random_document_starts
from tests.seeds import seed_afresh


@pytest.mark.parametrize("taps", [2, 3, 4, 16])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_equals_the_sum_over_the_documents_tokens(taps: int, packed: bool) -> None:
    seed_afresh()
    conv, x = ShortConv(3, taps), torch.randn(2, 9, 3)
    doc_start = random_document_starts(2, 9) if packed else None
    y = conv(x, doc_start)
    for b in range(2):
        for t in range(9):
            first = 0 if doc_start is None else int(doc_start[b, t])
            expected = sum(conv.weight[:, i] * x[b, t - i] for i in range(taps) if t - i >= first)
            torch.testing.assert_close(y[b, t], expected)


def test_documents_that_began_before_the_call() -> None:
    """A negative start is no start: the tokens of the call are all there is to see."""
    conv, x = ShortConv(3, 4), torch.randn(1, 5, 3)
    torch.testing.assert_close(conv(x, document_starts([[-7]], 5)), conv(x))


@pytest.mark.parametrize("taps", [2, 4, 9])
def test_steps_equal_the_parallel_form(taps: int) -> None:
    seed_afresh()
    conv, x = ShortConv(5, taps), torch.randn(2, 7, 5)
    window = conv.init_window(2)
    assert window.shape == (2, taps - 1, 5)
    for t, y in enumerate(conv(x).unbind(1)):
        before = window.clone()
        step, after = conv.step(x[:, t], window)
        torch.testing.assert_close(step, y)
        assert torch.equal(window, before) and after.shape == window.shape
        window = after


def test_autocast_changes_nothing() -> None:
    conv, x = ShortConv(8, 4), torch.randn(2, 7, 8)
    y, (step, window) = conv(x), conv.step(x[:, 3], x[:, :3].flip(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), y)
        assert torch.equal(conv.step(x[:, 3], x[:, :3].flip(1))[0], step)
    assert torch.equal(window, x[:, 1:4].flip(1))
    torch.testing.assert_close(step, y[:, 3])


def test_starts_as_a_shift_by_one_token() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 50, 200)
    y = ShortConv(200, 4)(x)
    along = torch.stack(
        [torch.nn.functional.cosine_similarity(y[:, 3:], x[:, 3 - i : 50 - i], -1).mean() for i in range(4)]
    )
    assert along[1] > 0.9 and along[[0, 2, 3]].abs().max() < 0.2


def test_only_the_past_and_present_matter() -> None:
    seed_afresh()
    conv, x = ShortConv(3, 4), torch.randn(2, 9, 3)
    y = conv(x)
    x[:, 5:] += 1
    assert torch.equal(conv(x)[:, :5], y[:, :5])
