"""Cross-entropy of a linear layer: in blocks of rows, against all logits at once in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from slotmamba_kernels import linear_cross_entropy
from slotmamba_kernels.cross_entropy import chunked
from slotmamba_kernels.cross_entropy.chunked import linear_cross_entropy_op
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.seeds import seed_afresh

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNKED = ("torch", "triton")
BACKENDS = ("reference", *CHUNKED)
# Rows, channels, vocabulary: none, one, a few, odd everywhere, more columns than a program takes at a time.
SHAPES = [(0, 8, 11), (1, 8, 11), (5, 1, 1), (13, 7, 129), (37, 16, 1000), (3, 8, 4097), (9, 8, 10_007)]
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that there are several and the last is not full."""
    monkeypatch.setattr(chunked, "block_rows", lambda vocab, device: 4)


def random_inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Inputs:
    """Logits of several units, some targets the likeliest token, some not."""
    rows, width, vocab = shape
    hidden = 3 * torch.randn(rows, width, device=DEVICE)
    weight = torch.randn(vocab, width, device=DEVICE)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets[::2] = (hidden.double() @ weight.double().t()).argmax(-1)[::2]
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def whole_inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    """Small integers, whose products every dtype holds exactly, so that no rounding depends on the matrix product."""
    rows, width, vocab = shape
    hidden, weight = (torch.randint(-1, 2, (count, width), device=DEVICE).to(dtype) for count in (rows, vocab))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (rows,), device=DEVICE)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden.double() @ weight.double().t()
    log_partition = logits.exp().sum(-1).log()
    return log_partition - logits[torch.arange(len(targets)), targets], log_partition, logits.argmax(-1) == targets


def loss(nll: Tensor, log_partition: Tensor, weights: Tensor) -> Tensor:
    """What training minimises, with a weight for each token: cross-entropy and the z-loss."""
    return (weights * (nll + 0.1 * log_partition.square())).sum()


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs, weights: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(outputs[0], outputs[1], weights.to(outputs[0].dtype)), inputs[:2])


def all_results(inputs: Inputs, weights: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    outputs = linear_cross_entropy(*inputs, backend=backend)
    return *outputs, *gradients(outputs, inputs, weights)


def assert_near(got: Tensor, want: Tensor, tolerance: float, name: str, least: float = 1.0) -> None:
    """Relative to the largest magnitude wanted, or to `least`: where a target is certain, all that is wanted is 0."""
    assert got.shape == want.shape, name
    if want.numel():
        difference, scale = (float(x.detach().double().abs().max()) for x in (got - want, want))
        assert difference <= tolerance * max(scale, least), f"{name}: off by {difference:.2e}, largest {scale:.2e}"


def assert_gradients_near(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    """In relative norm."""
    for name, ours, theirs in zip(("hidden", "weight"), got, want, strict=True):
        relative = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert relative < tolerance, f"gradient of {name}: off by {relative:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(backend: str, shape: tuple[int, int, int]) -> None:
    seed_afresh()
    inputs = random_inputs(shape)
    weights = torch.rand(shape[0], device=DEVICE)
    got, want = linear_cross_entropy(*inputs, backend=backend), exact(*inputs)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bool]
    assert_near(got[0], want[0], 1e-5, "nll", least=30.0)  # the size of the logits that cancel in it
    assert_near(got[1], want[1], 1e-5, "log_partition")
    assert torch.equal(got[2], want[2])
    for name, ours, theirs in zip(
        ("hidden", "weight"), gradients(got, inputs, weights), gradients(want, inputs, weights), strict=True
    ):
        assert ours.dtype == torch.float32
        assert_near(ours, theirs.double(), 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CHUNKED)
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    """Everything after the logits is float32; their gradient is rounded once, and so are its products."""
    seed_afresh()
    inputs, weights = whole_inputs((37, 64, 1000), dtype), torch.rand(37, device=DEVICE)
    got, want = linear_cross_entropy(*inputs, backend=backend), exact(*inputs)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bool]
    assert_near(got[0], want[0], 1e-6, "nll")
    assert_near(got[1], want[1], 1e-6, "log_partition")
    ours = gradients(got, inputs, weights)
    assert all(x.dtype == dtype for x in ours)
    assert_gradients_near(ours, gradients(want, inputs, weights), 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_its_dtype_and_returns_float32_gradients(backend: str) -> None:
    seed_afresh()
    hidden, weight, targets = whole_inputs((37, 64, 1000), torch.float32)
    with torch.no_grad():
        hidden.add_(2**-12)  # which bfloat16 drops
        hidden[hidden == 2**-12] = 0
    weights = torch.rand(37, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, backend=backend)
    assert [x.dtype for x in got] == [torch.float32, torch.float32, torch.bool]
    want = exact(hidden.bfloat16(), weight, targets)
    assert_near(got[0], want[0], 1e-6, "nll")
    ours = gradients(got, (hidden, weight, targets), weights)
    assert all(x.dtype == torch.float32 for x in ours)
    assert_gradients_near(ours, gradients(want, (hidden, weight, targets), weights), 1e-2)


def test_autocast_takes_mixed_dtypes() -> None:
    seed_afresh()
    hidden, weight, targets = whole_inputs((5, 4, 9), torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        for backend in BACKENDS:
            nll, _, _ = linear_cross_entropy(hidden.bfloat16(), weight, targets, backend=backend)
            assert_near(nll, exact(hidden, weight, targets)[0], 1e-6, backend)


def test_autocast_leaves_float64_alone() -> None:
    seed_afresh()
    inputs = random_inputs((5, 4, 9), torch.float64)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        for backend in ("reference", "torch"):
            got = linear_cross_entropy(*inputs, backend=backend)
            assert_near(got[0], exact(*inputs)[0], 1e-12, backend)


def test_weight_gradients_of_many_blocks_are_added_in_float32() -> None:
    """In bfloat16 a sum of 512 equal numbers stops growing."""
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    nll, _, _ = linear_cross_entropy(
        hidden, weight, torch.zeros(2048, dtype=torch.long, device=DEVICE), backend="torch"
    )
    (gradient,) = torch.autograd.grad(nll.sum(), weight)
    assert gradient.flatten().tolist() == [-1024.0, 1024.0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_by_finite_differences(backend: str) -> None:
    seed_afresh()
    hidden, weight, targets = random_inputs((9, 3, 7), torch.float64)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        nll, log_partition, _ = linear_cross_entropy(hidden, weight, targets, backend=backend)
        return nll, log_partition

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("backend", CHUNKED)
def test_gradient_through_one_output_only(backend: str) -> None:
    seed_afresh()
    inputs = random_inputs((6, 5, 50))
    for which in (0, 1):
        got = torch.autograd.grad(linear_cross_entropy(*inputs, backend=backend)[which].sum(), inputs[:2])
        want = torch.autograd.grad(exact(*inputs)[which].sum(), inputs[:2])
        for ours, theirs in zip(got, want, strict=True):
            assert_near(ours, theirs.double(), 1e-5, f"output {which}")


@pytest.mark.parametrize("backend", CHUNKED)
def test_extreme_logits(backend: str) -> None:
    """Large ones do not overflow, -inf has no share, NaN is seen, and of equal logits the first is the likeliest."""
    weight = torch.eye(4, device=DEVICE)
    hidden = torch.tensor(
        [[9e4, 0, 0, 0], [-9e4, -9e4, -9e4, -9e4], [1, float("-inf"), 1, 0], [0, float("nan"), 0, 0]], device=DEVICE
    )
    # With the identity for a matrix, 0 * inf would be NaN everywhere: the logits are given through the kernels alone.
    kernels, targets = chunked._kernels(backend), torch.tensor([0, 1, 2, 0], device=DEVICE)
    nll, log_partition = torch.full((2, 4), float("nan"), device=DEVICE)
    correct = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    kernels.statistics(hidden.clone(), targets, nll, log_partition, correct)
    assert nll[:3].tolist() == pytest.approx([0.0, 1.3862944, 0.8619948])
    assert log_partition[:2].tolist() == pytest.approx([9e4, -9e4 + 1.3862944])
    assert nll[3].isnan() and log_partition[3].isnan()
    assert correct[:3].tolist() == [True, False, False]
    nll, _, correct = linear_cross_entropy(hidden[:2], weight, torch.tensor([1, 0], device=DEVICE), backend=backend)
    assert nll.tolist() == pytest.approx([9e4, 1.3862944]) and correct.tolist() == [False, True]


@pytest.mark.parametrize("backend", CHUNKED)
def test_reads_no_memory_that_it_did_not_write(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In deterministic mode torch fills what torch.empty returns with NaN, and refuses ops that are not repeatable."""
    seed_afresh()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what that mode asks for on CUDA
    inputs, weights = random_inputs((13, 8, 300)), torch.rand(13, device=DEVICE)
    want = all_results(inputs, weights, backend)
    torch.use_deterministic_algorithms(True)
    try:
        got = all_results(inputs, weights, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", CHUNKED)
def test_writes_only_its_outputs(backend: str) -> None:
    """Rows around the block, which belong to others, stay as they are."""
    seed_afresh()
    kernels = chunked._kernels(backend)
    logits = torch.randn(5, 4099, device=DEVICE)
    before = logits.clone()
    numbers = [torch.randn(5, device=DEVICE) for _ in range(4)]
    kept = [x.clone() for x in numbers]
    correct = torch.ones(5, dtype=torch.bool, device=DEVICE)
    targets = torch.randint(4099, (5,), device=DEVICE)
    inside = slice(1, 4)
    kernels.gradient(logits[inside], targets[inside], *(x[inside] for x in numbers[:3]))
    assert not torch.equal(logits[inside], before[inside])
    logits = logits[inside].clone()
    kernels.statistics(logits, targets[inside], numbers[0][inside], numbers[1][inside], correct[inside])
    for x, y in zip(numbers, kept, strict=True):
        assert torch.equal(x[[0, 4]], y[[0, 4]])
    assert correct[0] and correct[4]


@pytest.mark.parametrize("backend", CHUNKED)
def test_two_runs_are_equal_bit_for_bit(backend: str) -> None:
    seed_afresh()
    inputs, weights = random_inputs((37, 16, 1000)), torch.rand(37, device=DEVICE)
    runs = [all_results(inputs, weights, backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", CHUNKED)
def test_never_holds_all_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a forward and backward pass is larger than a block of logits or the weight."""
    seed_afresh()
    inputs = random_inputs((64, 8, 500))
    largest: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point())
            return result

    original = chunked._blocks

    def watched(hidden: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The op's own dispatch hides what is inside, so look from inside."""
        with Watch():
            yield from original(hidden, matrix)

    monkeypatch.setattr(chunked, "_blocks", watched)
    outputs = linear_cross_entropy(*inputs, backend=backend)
    gradients(outputs, inputs, torch.rand(64, device=DEVICE))
    assert largest and max(largest) == max(4 * 500, 500 * 8)


@pytest.mark.parametrize("backend", CHUNKED)
def test_is_an_op_that_torch_compile_understands(backend: str) -> None:
    seed_afresh()
    for shape in ((5, 4, 9), (1, 4, 9)):
        hidden, weight, targets = random_inputs(shape)
        arguments = (hidden, weight, targets, torch.float32, backend)
        torch.library.opcheck(linear_cross_entropy_op, arguments)
        with torch.no_grad():
            numbers = [torch.rand(shape[0], device=DEVICE) for _ in range(3)]
            torch.library.opcheck(
                chunked.linear_cross_entropy_backward_op, (hidden, weight, targets, *numbers, torch.float32, backend)
            )


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("wrap", ["compile", "checkpoint"])
def test_within_compiled_and_checkpointed_code(backend: str, wrap: str) -> None:
    seed_afresh()
    inputs, weights = random_inputs((9, 4, 30)), torch.rand(9, device=DEVICE)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear_cross_entropy(hidden * 2, weight, targets, backend=backend)

    if wrap == "compile":
        got = torch.compile(plain, fullgraph=True, backend="aot_eager")(*inputs)
    else:
        got = checkpoint(plain, *inputs, use_reentrant=False)
    want = plain(*inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    for ours, theirs in zip(gradients(got, inputs, weights), gradients(want, inputs, weights), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_auto_is_torch_on_a_cpu() -> None:
    seed_afresh()
    hidden, weight, targets = (x.detach().cpu() for x in random_inputs((8, 4, 100)))
    want = linear_cross_entropy(hidden, weight, targets, backend="torch")
    got = linear_cross_entropy(hidden, weight, targets)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("vocab", "device", "rows"),
    [(1, "cpu", 2**22), (2048, "cpu", 2048), (32_000, "cpu", 128), (2**23, "cpu", 1), (32_000, "cuda", 2048),
     (50_304, "cuda", 1280), (2**25, "cuda", 2)],
)  # fmt: skip
def test_rows_of_a_block(vocab: int, device: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert chunked.block_rows(vocab, device) == rows


BAD: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Inputs], str]] = {
    "channels": (lambda h, w, t: (h[:, 1:], w, t), r"shapes \[5, 3\] and \[9, 4\], expected \[N, C\] and \[V, C\]"),
    "dimensions": (lambda h, w, t: (h[None], w, t), r"expected \[N, C\]"),
    "no vocabulary": (lambda h, w, t: (h, w[:0], t), r"expected \[N, C\] and \[V, C\]"),
    "rows": (lambda h, w, t: (h, w, t[1:]), r"targets have shape \[4\], expected \[5\]"),
    "float targets": (lambda h, w, t: (h, w, t.float()), "expected integers"),
    "integers": (lambda h, w, t: (h.long(), w, t), "expected floating point"),
    "mixed": (lambda h, w, t: (h.bfloat16(), w, t), "cast one, or use autocast"),
    "too large": (lambda h, w, t: (h, w, torch.full_like(t, 9)), "targets from 9 to 9, expected 0 to 8"),
    "negative": (lambda h, w, t: (h, w, torch.full_like(t, -100)), "expected 0 to 8"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_mistakes_are_explained(change: Callable[[Tensor, Tensor, Tensor], Inputs], message: str) -> None:
    inputs = change(torch.randn(5, 4), torch.randn(9, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda', expected one of auto, reference, torch, triton"):
        linear_cross_entropy(torch.randn(1, 1), torch.randn(1, 1), torch.zeros(1, dtype=torch.long), backend="cuda")


def _both_ways(dtype: torch.dtype, vocab: int) -> Callable[[], object]:
    def call() -> object:
        hidden = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
        weight = torch.zeros(vocab, 4, dtype=dtype, requires_grad=True)
        nll, log_partition, _ = linear_cross_entropy(hidden, weight, torch.zeros(3, dtype=torch.long), backend="triton")
        return torch.autograd.grad(nll.sum() + log_partition.sum(), (hidden, weight))

    return call


# A vocabulary that is a multiple of 16, one that is not, and 1, each of which the compiler treats differently.
CALLS = {
    "bfloat16, 32000": _both_ways(torch.bfloat16, 32_000),
    "bfloat16, 50257": _both_ways(torch.bfloat16, 50_257),
    "bfloat16, 1": _both_ways(torch.bfloat16, 1),
    "float16": _both_ways(torch.float16, 32_000),
    "float32": _both_ways(torch.float32, 50_257),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile(architecture: int) -> None:
    compiled = compile_in_subprocess(architecture, "tests.kernels.test_cross_entropy:CALLS")
    assert compiled == ["_gradient_kernel", "_statistics_kernel"]
