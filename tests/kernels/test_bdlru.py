"""BD-LRU: the chunked scan against the definition, and what the recurrence promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slotmamba_kernels.bdlru import bdlru

BACKENDS = ["reference", "torch"]


def _inputs(batch: int, length: int, blocks: int, m: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    width = blocks * m
    return {
        "v": torch.randn(batch, length, width, dtype=dtype, requires_grad=True),
        "gates": torch.randn(batch, length, blocks, m, m + 1, dtype=dtype).softmax(-1).requires_grad_(),
        "state": torch.randn(batch, width, dtype=dtype, requires_grad=True),
    }


def _doc_starts(rows: list[list[int]], length: int) -> Tensor:
    """Each row: where its documents start; the first may be negative."""
    return torch.tensor([[max(s for s in starts if s <= t) for t in range(length)] for starts in rows])


def _outputs_and_gradients(backend: str, inputs: dict[str, Tensor], doc_start: Tensor | None) -> list[Tensor]:
    h, state = bdlru(**inputs, doc_start=doc_start, backend=backend)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in (h, state))
    assert isinstance(loss, Tensor)
    return [h, state, *torch.autograd.grad(loss, list(inputs.values()))]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 16, 37])
def test_torch_equals_reference_in_float64(m: int, length: int) -> None:
    torch.manual_seed(100 * m + length)
    inputs = _inputs(3, length, blocks=3, m=m)
    packed = _doc_starts([[0], [-5, length // 2], [-1, length // 3, 2 * length // 3, length - 1]], length)
    for doc_start in (None, packed):
        expected = _outputs_and_gradients("reference", inputs, doc_start)
        for got, want in zip(_outputs_and_gradients("torch", inputs, doc_start), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_reference_is_the_equation() -> None:
    inputs = _inputs(1, 2, blocks=1, m=2)
    v, gates, h = inputs["v"][0], inputs["gates"][0, :, 0], inputs["state"][0]
    for t in range(2):
        h = torch.stack([gates[t, i, 0] * h[0] + gates[t, i, 1] * h[1] + gates[t, i, 2] * v[t, i] for i in range(2)])
    torch.testing.assert_close(bdlru(**inputs, backend="reference")[1][0], h, rtol=0, atol=1e-12)


def test_torch_gradients_by_finite_differences() -> None:
    inputs = _inputs(2, 5, blocks=2, m=2)
    doc_start = _doc_starts([[-1], [0, 3]], 5)
    assert torch.autograd.gradcheck(lambda v, g, s: bdlru(v, g, s, doc_start, "torch"), tuple(inputs.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_documents_alone(backend: str) -> None:
    v, gates, state = _inputs(1, 20, blocks=2, m=4).values()
    packed, leaving = bdlru(v, gates, state, _doc_starts([[-3, 7, 8]], 20), backend)
    spans = [(slice(0, 7), state), (slice(7, 8), None), (slice(8, 20), None)]
    alone = [bdlru(v[:, span], gates[:, span], entering, backend=backend) for span, entering in spans]
    torch.testing.assert_close(packed, torch.cat([h for h, _ in alone], 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(leaving, alone[-1][1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_carried_over_a_split(backend: str) -> None:
    v, gates, state = _inputs(2, 23, blocks=2, m=3).values()
    doc_start = _doc_starts([[-2, 5], [0, 15]], 23)
    whole, leaving = bdlru(v, gates, state, doc_start, backend)
    first, between = bdlru(v[:, :9], gates[:, :9], state, doc_start[:, :9], backend)
    second, end = bdlru(v[:, 9:], gates[:, 9:], between, doc_start[:, 9:] - 9, backend)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, leaving, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_never_exceeds_its_inputs(backend: str) -> None:
    v, gates, _ = _inputs(4, 200, blocks=4, m=4, dtype=torch.float32).values()
    h, _ = bdlru(v, gates, backend=backend)
    # Softmax rows sum to 1 up to a few roundings, each of which may be passed on 200 times.
    assert h.abs().max() <= v.abs().max() * (1 + 200 * 4 * torch.finfo(torch.float32).eps)


def test_future_does_not_change_the_past() -> None:
    v, gates, state = (x.detach() for x in _inputs(2, 50, blocks=2, m=4, dtype=torch.float32).values())
    before, _ = bdlru(v, gates, state)
    v[:, 30:] += 1
    gates[:, 30:] = gates[:, 30:].flip(-1)
    after, _ = bdlru(v, gates, state)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_inputs_are_computed_in_float32(backend: str) -> None:
    v, gates, _ = _inputs(2, 40, blocks=2, m=4, dtype=torch.float32).values()
    v = v.detach().bfloat16().requires_grad_()
    h, state = bdlru(v, gates, backend=backend)
    exact, leaving = bdlru(v.float(), gates, backend=backend)
    assert h.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(h, exact.bfloat16()) and torch.equal(state, leaving)
    h.sum().backward()
    assert v.grad is not None and v.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 5)}, "v has shape"),
        ({"v": torch.zeros(2, 0, 4)}, "v has shape"),
        ({"v": torch.zeros(2, 5, 4, dtype=torch.long)}, "v is torch.int64"),
        ({"gates": torch.zeros(2, 5, 2, 2, 2)}, "gates has shape"),
        ({"gates": torch.zeros(2, 5, 2, 3, 4)}, "gates has shape"),
        ({"gates": torch.zeros(2, 5, 12)}, "gates has shape"),
        ({"state": torch.zeros(1, 4)}, "state has shape"),
        ({"doc_start": torch.zeros(5, dtype=torch.long)}, "doc_start has shape"),
        ({"doc_start": torch.zeros(2, 5)}, "doc_start is torch.float32"),
        ({"backend": "cudnn"}, "unknown backend 'cudnn'"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Tensor | str], message: str) -> None:
    arguments = {"v": torch.zeros(2, 5, 4), "gates": torch.zeros(2, 5, 2, 2, 3), **change}
    with pytest.raises(ValueError, match=message):
        bdlru(**arguments)
