"""BD-LRU's Triton kernels against the definition in float64: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slotmamba_kernels.bdlru import TRITON_BLOCK_SIZES, bdlru
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.seeds import seed_afresh

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GPU = pytest.mark.skipif(not CUDA, reason="needs CUDA")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

triton_op = pytest.importorskip("slotmamba_kernels.bdlru.triton_op")


def _inputs(
    batch: int, length: int, width: int, m: int, v: torch.dtype = torch.float32, gates: torch.dtype = torch.float32
) -> list[Tensor]:
    """v, gates and the entering state."""
    made = [
        torch.randn(batch, length, width, device=DEVICE).to(v),
        torch.randn(batch, length, width // m, m, m + 1, device=DEVICE).softmax(-1).to(gates),
        torch.randn(batch, width, device=DEVICE),
    ]
    return [x.requires_grad_() for x in made]


def _documents(batch: int, length: int) -> Tensor:
    """Row 0 is the document of the entering state, in others some start, also at token 0 and at the last one."""
    starts = torch.rand(batch, length, device=DEVICE) < 0.2
    starts[0], starts[1:, 0], starts[-1, -1] = False, True, True
    tokens = torch.arange(length, device=DEVICE).expand(batch, length)
    return torch.where(starts, tokens, -3).cummax(1).values


def _run(inputs: Sequence[Tensor], doc_start: Tensor | None = None, backend: str = "triton") -> tuple[Tensor, Tensor]:
    v, gates, state = inputs
    return bdlru(v, gates, state, doc_start, backend)


def _results(inputs: list[Tensor], doc_start: Tensor | None, weights: list[Tensor], backend: str) -> list[Tensor]:
    """h, the leaving state, and the gradients of the inputs."""
    outputs = _run(inputs, doc_start, backend)
    loss = sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def _compare(inputs: list[Tensor], doc_start: Tensor | None) -> None:
    v, _, state = inputs
    weights = [torch.randn(x.shape, device=DEVICE, dtype=torch.float64) for x in (v, state)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _results(exact, doc_start, weights, "reference")
    results = _results(inputs, doc_start, weights, "triton")
    assert [x.dtype for x in results] == [v.dtype, torch.float32, *(x.dtype for x in inputs)]
    for name, got, want in zip(["h", "leaving", "d_v", "d_gates", "d_state"], results, expected, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error <= TOLERANCE[v.dtype], f"{name}: {error:.1e}"


@pytest.fixture
def short_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads 3 tokens ahead, to spare the interpreter the tokens that a longer ring asks for beyond the end."""
    if not CUDA:
        for table in ("AHEAD", "AHEAD_BACKWARD", "AHEAD_COMPOSING"):
            monkeypatch.setattr(triton_op, table, dict.fromkeys(TRITON_BLOCK_SIZES, 3))


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def cut(size: int) -> None:
        monkeypatch.setattr(triton_op, "chunk_length", lambda batch, length, width, m: min(size, length))

    return cut


@pytest.mark.usefixtures("short_rings")
@pytest.mark.parametrize("m", TRITON_BLOCK_SIZES)
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (7, 7), (11, 4)])
def test_equals_the_reference(m: int, length: int, chunk: int, chunks_of: Callable[[int], None]) -> None:
    seed_afresh()
    chunks_of(chunk)
    # The second program has rows of 1 or 2 blocks only, or none is there.
    width = 32 + m if chunk < length else 2 * m
    _compare(_inputs(2, length, width, m), _documents(2, length) if chunk < length else None)


@pytest.mark.usefixtures("short_rings")
@pytest.mark.parametrize(("m", "length", "chunk", "width"), [(2, 8, 3, 32), (8, 6, 6, 64), (16, 7, 2, 32)])
def test_whole_programs_equal_the_reference(
    m: int, length: int, chunk: int, width: int, chunks_of: Callable[[int], None]
) -> None:
    seed_afresh()
    chunks_of(chunk)
    _compare(_inputs(2, length, width, m), _documents(2, length).short() if m == 8 else None)


@GPU
@pytest.mark.parametrize("m", TRITON_BLOCK_SIZES)
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1000, 1024), (2, 515, 80), (3, 257, 96), (9, 130, 1024)])
def test_larger_sizes_equal_the_reference(m: int, batch: int, length: int, width: int) -> None:
    seed_afresh()
    for doc_start in (None, _documents(batch, length)):
        _compare(_inputs(batch, length, width, m), doc_start)
        _compare(_inputs(batch, length, width, m, torch.bfloat16), doc_start)


@pytest.mark.usefixtures("short_rings")
@pytest.mark.parametrize("gates", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(v: torch.dtype, gates: torch.dtype, chunks_of: Callable[[int], None]) -> None:
    seed_afresh()
    chunks_of(3)
    _compare(_inputs(2, 8, 32, 8 if gates == torch.float32 else 4, v, gates), _documents(2, 8))


@pytest.mark.usefixtures("short_rings")
@pytest.mark.parametrize("m", [2, 8])
def test_writes_all_it_returns_and_nothing_else_and_the_same_twice(
    m: int, chunks_of: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_afresh()
    chunks_of(3)
    inputs, doc_start = _inputs(2, 7, 32 + m, m), _documents(2, 7)
    weights = [torch.randn_like(x, dtype=torch.float64) for x in (inputs[0], inputs[2])]
    first = _results(inputs, doc_start, weights, "triton")
    guarded: list[Tensor] = []

    new_empty = Tensor.new_empty

    def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None, **interpreters: Any) -> Tensor:
        """Poison, between two bands of poison."""
        if interpreters:
            return new_empty(like, *shape, **interpreters)
        size, dtype = math.prod(shape), dtype or like.dtype
        poison = torch.nan if dtype.is_floating_point else 77
        guarded.append(torch.full((size + 256,), poison, dtype=dtype, device=like.device))
        return guarded[-1][128 : 128 + size].view(shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", lambda like: empty(like, *like.shape))
        patched.setattr(Tensor, "new_empty", empty)
        second = _results(inputs, doc_start, weights, "triton")
    assert len(guarded) == 5 + 3 + 3  # outputs of both ops; maps, cuts and states of each
    for buffer in guarded:
        bands = torch.cat([buffer[:128], buffer[-128:]])
        assert (bands.isnan() if buffer.is_floating_point() else bands == 77).all()
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


@pytest.mark.usefixtures("short_rings")
@pytest.mark.parametrize("chunk", [2, 6])
def test_nothing_passes_the_start_of_a_document(chunk: int, chunks_of: Callable[[int], None]) -> None:
    seed_afresh()
    chunks_of(chunk)
    v, gates, state = (x.detach() for x in _inputs(1, 6, 32, 4))
    second = [v[:, 3:].clone().requires_grad_(), gates[:, 3:].clone().requires_grad_()]
    alone, leaving = bdlru(second[0], second[1], backend="triton")
    weights = [torch.randn_like(v[:, 3:]), torch.randn_like(state)]
    expected = torch.autograd.grad([alone, leaving], second, weights)

    v[:, :3], gates[:, :3], state[:] = torch.nan, torch.nan, torch.nan
    packed = [v.requires_grad_(), gates.requires_grad_()]
    doc_start = torch.tensor([[-1, -1, -1, 3, 3, 3]], device=DEVICE)
    h, end = _run([*packed, state], doc_start)
    got = torch.autograd.grad([h[:, 3:], end], packed, weights)
    for x, y in zip([h[:, 3:], end, *(g[:, 3:] for g in got)], [alone, leaving, *expected], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("short_rings")
def test_strides_are_free() -> None:
    seed_afresh()
    v, gates, state = (x.detach() for x in _inputs(2, 5, 32, 4))
    doc_start = _documents(2, 5)
    strided = [x.mT.contiguous().mT.requires_grad_() for x in (v, gates, state)]
    h, leaving = _run(strided, doc_start.T.contiguous().T)
    expected, end = _run([v, gates, state], doc_start)
    assert torch.equal(h, expected) and torch.equal(leaving, end)
    h.sum().backward()  # the gradient of a sum is an expanded scalar
    assert all(x.grad is not None and x.grad.isfinite().all() for x in strided)


def test_opcheck() -> None:
    seed_afresh()
    inputs = [x.detach() for x in _inputs(2, 3, 32, 4)]
    for doc_start in (None, _documents(2, 3)):
        torch.library.opcheck(triton_op.bdlru_forward, (*(x.clone().requires_grad_() for x in inputs), doc_start))
    h, leaving = _run(inputs)
    torch.library.opcheck(triton_op.bdlru_backward, (h.clone(), leaving.clone(), *inputs, None, h))


@pytest.mark.usefixtures("short_rings")
def test_compile_autocast_and_checkpointing_see_the_op() -> None:
    seed_afresh()
    inputs = _inputs(1, 5, 32, 4)
    run = partial(bdlru, backend="triton")

    def gradients(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        h, leaving = function(*inputs)
        return [h, leaving, *torch.autograd.grad(h.square().sum() + leaving.square().sum(), inputs)]

    expected = gradients(run)
    with torch.autocast(DEVICE, torch.bfloat16):
        autocast = gradients(run)
    compiled = gradients(torch.compile(run, fullgraph=True, backend="inductor" if CUDA else "aot_eager"))
    checkpointed = gradients(lambda *x: checkpoint(run, *x, use_reentrant=False))
    for results in (autocast, compiled, checkpointed):
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)


def test_chunks_are_cut_where_rows_are_few() -> None:
    for m in TRITON_BLOCK_SIZES:
        assert triton_op.chunk_length(64, 4096, 1024, m) == 4096
        assert triton_op.chunk_length(1, 32768, 1024, m) < 1024
        assert triton_op.chunk_length(1, 1, 1024, m) == 1
        assert triton_op.chunk_length(1, 100, 1024, m) == 100


@pytest.mark.parametrize(
    ("m", "dtype", "message"),
    [(3, torch.float32, "takes blocks of 1, 2, 4, 8, 16 channels, not 3"), (2, torch.float64, "not torch.float64")],
)
def test_what_the_kernels_cannot_do_is_refused(m: int, dtype: torch.dtype, message: str) -> None:
    v, gates = torch.zeros(1, 2, 6, dtype=dtype), torch.zeros(1, 2, 6 // m, m, m + 1)
    with pytest.raises(ValueError, match=message):
        bdlru(v, gates, backend="triton")
    bdlru(v, gates)


def _launch(m: int, width: int, chunk: int, v: torch.dtype, doc_start: Tensor | None) -> None:
    triton_op.chunk_length = lambda batch, length, width, m: chunk
    inputs = [torch.zeros(2, 128, width, dtype=v), torch.zeros(2, 128, width // m, m, m + 1), torch.zeros(2, width)]
    h, _ = _run([x.requires_grad_() for x in inputs], doc_start)
    h.sum().backward()


CALLS = {
    **{
        f"m={m}": partial(_launch, m, 1024, 64, torch.bfloat16, torch.zeros(2, 128, dtype=torch.int64))
        for m in TRITON_BLOCK_SIZES
    },
    "one walk, rows that are not there": partial(_launch, 8, 48, 128, torch.float32, None),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(architecture: int) -> None:
    kernels = compile_in_subprocess(architecture, "tests.kernels.test_bdlru_triton:CALLS")
    assert kernels == ["compose_chunks", "scan_chunks", "scan_chunks_backward"]
