"""The fused Kronecker addressing against float64 products of softmaxes, and against the torch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slotmamba_kernels import kronecker_topk
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.seeds import seed_afresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 20_011 if DEVICE == "cuda" else 131  # more than one program of 128 rows, the last one not full

# (U, p, k): tiles that a thread, a part of a warp, a warp and several warps hold, full and not.
SIZES = [
    (1, 2, 1), (1, 2, 2), (1, 30, 5), (1, 1000, 7), (1, 4096, 32), (2, 3, 9), (2, 64, 32), (3, 3, 27), (3, 10, 8),
    (4, 5, 11), (5, 2, 32), (5, 4, 1), (5, 4, 8), (10, 4, 16), (10, 2, 3),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On a CPU, where the interpreter runs, every size with one dtype.
CASES = [
    (*sizes, dtype)
    for number, sizes in enumerate(SIZES)
    for dtype in (DTYPES if DEVICE == "cuda" else [DTYPES[number % 3]])
]


def random_logits(factors: int, size: int, dtype: torch.dtype = torch.float32, rows: int | None = None) -> Tensor:
    if rows is None:
        rows = ROWS if size <= 10 or DEVICE == "cuda" else 5
    return (2 * torch.randn(rows, factors, size)).to(DEVICE, dtype)


def weights_of(logits: Tensor, indices: Tensor) -> Tensor:
    """Float64 weights of the slots at indices [rows, k]: products of softmax entries, one for each digit."""
    factors, size = logits.shape[-2:]
    powers = [size**power for power in reversed(range(factors))]
    digits = torch.stack([indices.long() // power % size for power in powers], -2)  # [rows, U, k]
    return logits.double().softmax(-1).gather(-1, digits).prod(-2)


def run_both_ways(logits: Tensor, k: int, upstream: Tensor, backend: str = "triton") -> tuple[Tensor, Tensor, Tensor]:
    """Indices, weights and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    indices, weights = kronecker_topk(leaf, k, backend)
    (gradient,) = torch.autograd.grad(weights, leaf, upstream)
    return indices, weights, gradient


@pytest.mark.parametrize(("factors", "size", "k", "dtype"), CASES, ids=str)
def test_equals_float64_products_and_the_torch_backend(factors: int, size: int, k: int, dtype: torch.dtype) -> None:
    """The same slots as the torch backend, ties included (of half-precision logits there are many); the weights and the
    gradient that float64 gives for those slots."""
    seed_afresh()
    logits = random_logits(factors, size, dtype)
    upstream = torch.randn(len(logits), k, device=DEVICE)
    indices, weights, gradient = run_both_ways(logits, k, upstream)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(indices, kronecker_topk(logits, k, "torch")[0])

    leaf = logits.double().requires_grad_()
    want = weights_of(leaf, indices)
    (want_gradient,) = torch.autograd.grad(want, leaf, upstream.double())
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-30)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    # Gradients of a row are sums of terms of either sign, and float16 has no number below 6e-8.
    scale = (upstream * weights).abs().sum(-1).view(-1, 1, 1) + (1e-4 if dtype == torch.float16 else 1e-30)
    assert ((gradient.double() - want_gradient).abs() <= tolerance * scale).all()


@pytest.mark.parametrize(("factors", "size", "k"), [(2, 3, 4), (3, 10, 8), (4, 5, 32), (5, 4, 8), (10, 4, 8)])
def test_finds_the_largest_of_all_products(factors: int, size: int, k: int) -> None:
    """Of logits whose sums are distinct integers times a power of two: float32 then knows the order exactly."""
    seed_afresh()
    rows = 3 if size**factors > 10_000 else 50
    slots = size**factors
    digits = torch.rand(rows, factors, size).argsort(-1)
    power = size ** torch.rand(rows, factors).argsort(-1)
    integers = digits * power.unsqueeze(-1)
    sums = torch.zeros(rows, 1, dtype=torch.long)
    for u in range(factors):
        sums = (sums.unsqueeze(-1) + integers[:, u].unsqueeze(-2)).flatten(-2)
    assert torch.equal(sums.sort(-1).values, torch.arange(slots).expand(rows, -1))
    logits = (integers * 2.0**-16).to(DEVICE)
    assert torch.equal(kronecker_topk(logits, k, "triton")[0].cpu().long(), sums.topk(k, -1).indices)


@pytest.mark.parametrize("k", [1, 8, 20])
def test_ties_are_broken_as_the_torch_backend_breaks_them(k: int) -> None:
    seed_afresh()
    coarse = torch.randint(3, (ROWS, 3, 5), device=DEVICE).float()
    for logits in (torch.zeros(2, 5, 4, device=DEVICE), coarse):
        indices, weights = kronecker_topk(logits, k, "triton")
        expected, expected_weights = kronecker_topk(logits, k, "torch")
        assert torch.equal(indices, expected)
        assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize(("factors", "size", "k"), [(5, 4, 8), (2, 40, 9), (1, 600, 4)])
def test_two_runs_are_equal_bit_by_bit(factors: int, size: int, k: int) -> None:
    seed_afresh()
    logits = random_logits(factors, size)
    upstream = torch.randn(len(logits), k, device=DEVICE)
    first, second = (run_both_ways(logits, k, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("factors", "size", "k"), [(3, 3, 5), (5, 4, 8), (1, 70, 3)])
def test_touches_its_own_numbers_only(factors: int, size: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs amid NaN, outputs full of NaN amid numbers that must stay."""
    seed_afresh()
    guard = 4096
    buffers: list[tuple[Tensor, float]] = []
    # The module loads only where triton is there.
    from slotmamba_kernels.kronecker import fused

    def amid(shape: tuple[int, ...], dtype: torch.dtype, outside: float, inside: float | Tensor) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * guard,), outside, dtype=dtype, device=DEVICE)
        middle = buffer[guard : guard + count].view(shape)
        middle.copy_(torch.as_tensor(inside))
        buffers.append((buffer, outside))
        return middle

    def poisoned(x: Tensor) -> Tensor:
        return amid(tuple(x.shape), x.dtype, 7, float("nan") if x.is_floating_point() else -1)

    logits = random_logits(factors, size)
    upstream = torch.randn(len(logits), k, device=DEVICE)
    want = run_both_ways(logits, k, upstream)
    surrounded = amid(tuple(logits.shape), logits.dtype, float("nan"), logits)
    surrounded_upstream = amid(tuple(upstream.shape), upstream.dtype, float("nan"), upstream)
    buffers.clear()
    empty_outputs = fused._empty_outputs
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_empty_outputs", lambda *arguments: tuple(map(poisoned, empty_outputs(*arguments))))
        patch.setattr(torch, "empty_like", poisoned)
        got = run_both_ways(surrounded, k, surrounded_upstream)
    assert len(buffers) == 3 and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    for buffer, outside in buffers:
        assert (buffer[:guard] == outside).all() and (buffer[-guard:] == outside).all()


def test_minus_infinity_switches_slots_off() -> None:
    """They come last, with weight 0 and gradient 0, and every one only once."""
    seed_afresh()
    logits = random_logits(3, 3)
    logits[:, 1, 2] = logits[:, 2, 0] = -float("inf")
    k = 20  # of 27 slots 12 are on
    indices, weights, gradient = run_both_ways(logits, k, torch.ones(ROWS, k, device=DEVICE))
    expected, expected_weights, expected_gradient = run_both_ways(
        logits, k, torch.ones(ROWS, k, device=DEVICE), "torch"
    )
    assert torch.equal(indices, expected) and (weights[:, 12:] == 0).all() and (weights[:, :12] > 0).all()
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_meaning_has_slots_that_exist_and_no_weights(bad: float) -> None:
    """An index out of range would make the slot memory touch memory that is not its own."""
    seed_afresh()
    logits = random_logits(4, 3)
    expected = kronecker_topk(logits, 6, "triton")
    logits[1, 2, 1] = logits[3, 0, 0] = logits[3, 3, 2] = bad
    logits[5] = bad
    indices, weights = kronecker_topk(logits, 6, "triton")
    broken = torch.zeros(ROWS, dtype=torch.bool, device=DEVICE)
    broken[[1, 3, 5]] = True
    assert weights[broken].isnan().all()
    assert int(indices.min()) >= 0 and int(indices.max()) < 3**4
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()
    for got, want in zip((indices, weights), expected, strict=True):
        assert torch.equal(got[~broken], want[~broken])


def test_extreme_logits_are_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [0.0, -1e4]], device=DEVICE)
    indices, weights, gradient = run_both_ways(logits, 4, torch.ones(4, device=DEVICE))
    assert weights.isfinite().all() and indices[0] == 0 and weights[0] == 1 and gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (2, 3, 1, 5, 4), (0, 5, 4), (2, 0, 5, 4)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    seed_afresh()
    logits = torch.randn(shape, device=DEVICE)
    indices, weights, gradient = run_both_ways(logits, 8, torch.ones(*shape[:-2], 8, device=DEVICE))
    expected, _ = kronecker_topk(logits, 8, "torch")
    assert torch.equal(indices, expected) and weights.shape == expected.shape and gradient.shape == shape


def test_layout_of_inputs_does_not_matter() -> None:
    seed_afresh()
    logits = random_logits(4, 5)
    upstream = torch.randn(8, ROWS, device=DEVICE)
    transposed = logits.transpose(0, 2).contiguous().transpose(0, 2)
    assert not transposed.is_contiguous()
    want = run_both_ways(logits, 8, upstream.T.contiguous())
    got = run_both_ways(transposed, 8, upstream.T)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    # The gradient of a sum is one number, expanded.
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(kronecker_topk(leaf, 8, "triton")[1].sum(), leaf)
    torch.testing.assert_close(gradient, run_both_ways(logits, 8, torch.ones(ROWS, 8, device=DEVICE))[2])


def test_torch_library_sees_the_op() -> None:
    from slotmamba_kernels.kronecker.fused import kronecker_topk_backward, kronecker_topk_fused

    seed_afresh()
    logits = random_logits(3, 4, rows=7)
    weights, indices = kronecker_topk_fused(logits, 5)
    torch.library.opcheck(kronecker_topk_fused, (logits.clone().requires_grad_(), 5))
    torch.library.opcheck(kronecker_topk_backward, (logits, weights, indices, torch.randn_like(weights)))


def test_compiles_into_one_graph_and_obeys_checkpointing_and_autocast() -> None:
    seed_afresh()
    logits = random_logits(5, 4, rows=9)

    def loss(x: Tensor) -> Tensor:
        indices, weights = kronecker_topk(2 * x, 8, "triton")
        return (weights * (indices % 7)).sum()

    def gradient(function: Any) -> Tensor:
        leaf = logits.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(leaf), leaf)
        return found

    want = gradient(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled), want)
    assert torch.equal(gradient(lambda x: checkpoint(loss, x, use_reentrant=False)), want)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert kronecker_topk(logits, 8, "triton")[1].dtype == torch.float32
        assert torch.equal(gradient(loss), want)


def test_auto_falls_back_for_sizes_that_the_kernel_does_not_take() -> None:
    """And never does for an explicit "triton"."""
    seed_afresh()
    for shape, k in [((2, 65), 3), ((1, 4097), 3), ((3, 4), 33)]:
        logits = torch.randn(4, *shape, device=DEVICE)
        assert torch.equal(kronecker_topk(logits, k)[1], kronecker_topk(logits, k, "torch")[1])
        with pytest.raises(ValueError, match="backend 'triton' takes k <= 32, and p <= 64"):
            kronecker_topk(logits, k, "triton")
    with pytest.raises(ValueError, match="takes float32, bfloat16 or float16"):
        kronecker_topk(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE), 2, "triton")
    with pytest.raises(ValueError, match="unknown backend 'fast', expected one of auto, torch, triton"):
        kronecker_topk(torch.zeros(2, 3, device=DEVICE), 2, "fast")


def test_more_slots_than_an_index_tells_apart_are_refused() -> None:
    with pytest.raises(ValueError, match=r"64\^6 slots are more than the 2\^31"):
        kronecker_topk(torch.zeros(6, 64), 2)


def _calls() -> dict[str, Any]:
    def call(factors: int, size: int, k: int, dtype: torch.dtype) -> None:
        logits = torch.zeros(1024, factors, size, dtype=dtype, requires_grad=True)
        kronecker_topk(logits, k, "triton")[1].sum().backward()

    sizes = [
        (5, 4, 8, torch.bfloat16),
        (3, 10, 8, torch.float32),
        (2, 64, 32, torch.float16),
        (1, 4096, 16, torch.float32),
    ]
    return {str(arguments): lambda arguments=arguments: call(*arguments) for arguments in sizes}


CALLS = _calls()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(architecture: int) -> None:
    kernels = compile_in_subprocess(architecture, "tests.kernels.test_kronecker_triton:CALLS")
    assert kernels == ["topk_backward", "topk_forward"]
