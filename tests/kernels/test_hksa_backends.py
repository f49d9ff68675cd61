"""HKSA's definition against a second writing of it, and the vectorised backend against the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from slotmamba_kernels import kronecker_topk
from tests.kernels.hksa_by_hand import by_hand
from tests.kernels.hksa_cases import Case, assert_equal_to, random_case
from tests.seeds import seed_afresh

SHAPES: dict[str, dict[str, Any]] = {
    "one slot a token": {"writes": 1, "reads": 1},
    "one slot in all": {"writes": 1, "reads": 1, "num_slots": 1},
    "all slots": {"writes": 9, "reads": 9},
    "more written than read": {"writes": 5, "reads": 1},
    "more read than written": {"writes": 1, "reads": 6},
    "three steps": {"steps": 3},
    "four steps": {"steps": 4},
    "one of everything": {"batch": 1, "heads": 1, "dim": 1, "steps": 1, "writes": 1, "reads": 1},
    "one token": {"length": 1},
    "two tokens": {"length": 2},
    "odd sizes": {"batch": 3, "length": 17, "heads": 3, "dim": 5, "num_slots": 7},
    "most slots empty": {"num_slots": 200, "length": 5},
    "the same slots through time": {"same_slots": True, "length": 25},
    "one slot through time": {"same_slots": True, "length": 40, "writes": 1, "reads": 1},
    "short documents": {"documents": True, "length": 30},
    "short documents, the same slots": {"documents": True, "length": 30, "same_slots": True},
    "weights within (0, 1)": {"extremes": False},
}


def assert_backends_agree(case: Case) -> None:
    assert_equal_to(case.outputs("reference"), case.outputs("torch"))
    assert_equal_to(case.gradients("reference"), case.gradients("torch"))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=4)), ids=str)
def test_reference_is_what_hksa_md_says(options: tuple[bool, bool, bool, bool], steps: int) -> None:
    seed_afresh()
    documents, state, surprise, inject = options
    case = random_case(length=9, steps=steps, documents=documents, state=state, surprise=surprise, inject=inject)
    want = {name: torch.from_numpy(x) for name, x in by_hand(case)[0].items()}
    assert_equal_to(want, case.outputs("reference"), 1e-12)


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_reference_gradients_by_finite_differences(documents: bool, inject: bool) -> None:
    """Of the second writing, prediction errors held fixed: they are a measurement.

    Without extremes: on either side of w = 0.999, and of w = 0 with injection, the derivative is another.
    """
    seed_afresh()
    case = random_case(
        batch=1, length=5, heads=1, dim=2, writes=2, num_slots=3, documents=documents, inject=inject, extremes=False
    )
    _, errors = by_hand(case)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, dtype=x.dtype, generator=generator).numpy() for x in case.outputs().values()]

    def loss(case: Case) -> float:
        outputs, _ = by_hand(case, errors)
        return sum(float((x * weight).sum()) for x, weight in zip(outputs.values(), weights, strict=True))

    want = {}
    for name, x in case.tensors.items():
        if x.is_floating_point():
            want[name] = torch.zeros_like(x)
            for i in range(x.numel()):
                step = torch.zeros_like(x).view(-1)
                step[i] = 1e-6
                above, below = (case.with_tensors(**{name: x + sign * step.view_as(x)}) for sign in (1, -1))
                want[name].view(-1)[i] = (loss(above) - loss(below)) / 2e-6
    # A difference of two losses of some tens, over 2e-6, is good to about 1e-9, however small the derivative.
    assert_equal_to(want, case.gradients("reference"), 1e-6, least=0.1)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("inject", [False, True], ids=["", "inject"])
def test_torch_equals_reference(options: dict[str, Any], inject: bool) -> None:
    seed_afresh()
    assert_backends_agree(random_case(**options, inject=inject))


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=4)), ids=str)
def test_torch_equals_reference_with_every_optional_argument(options: tuple[bool, bool, bool, bool]) -> None:
    seed_afresh()
    documents, state, surprise, inject = options
    assert_backends_agree(random_case(documents=documents, state=state, surprise=surprise, inject=inject))


@pytest.mark.parametrize("number", range(20))
def test_torch_equals_reference_at_random_shapes(number: int) -> None:
    seed_afresh()

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))

    num_slots = draw(1, 12)
    documents, state, surprise, inject, same_slots = (bool(draw(0, 1)) for _ in range(5))
    case = random_case(
        batch=draw(1, 3), length=draw(1, 30), heads=draw(1, 3), steps=draw(1, 4), dim=draw(1, 9),
        writes=draw(1, num_slots), reads=draw(1, num_slots), num_slots=num_slots,
        documents=documents, state=state, surprise=surprise, inject=inject, same_slots=same_slots,
    )  # fmt: skip
    assert_backends_agree(case)


def test_torch_equals_reference_over_several_blocks_of_chains() -> None:
    """More chains than the vectorised form advances at once, and more token rows than it reads at once."""
    seed_afresh()
    case = random_case(batch=40, length=26, heads=1, num_slots=40, dim=2, documents=True)
    assert 40 * 40 > 1024 and 40 * 26 > 1024
    assert_backends_agree(case)


@pytest.mark.parametrize(("factors", "size"), [(1, 9), (2, 3), (3, 2), (4, 2), (5, 2)])
def test_torch_equals_reference_with_kronecker_addresses(factors: int, size: int) -> None:
    """Through to the gradient of the address logits."""
    seed_afresh()
    case = random_case(num_slots=size**factors)
    logits = 2 * torch.randn(2, *case.tensors["q"].shape[:-1], factors, size, dtype=torch.float64)
    gradients = []
    for backend in ("reference", "torch"):
        leaf = logits.clone().requires_grad_()
        (write_idx, write_w), (read_idx, read_w) = (kronecker_topk(leaf[i], k) for i, k in enumerate((4, 3)))
        addressed = case.with_tensors(write_idx=write_idx, write_w=write_w, read_idx=read_idx, read_w=read_w)
        o, state = addressed.call(backend)
        loss = (o * case.tensors["q"]).sum() + state.z.square().sum() + state.surprise.sum()
        gradients.append({"logits": torch.autograd.grad(loss, leaf)[0]})
    assert all(bool((which != 0).any()) for which in gradients[0]["logits"])
    assert_equal_to(*gradients)


def test_auto_is_torch() -> None:
    seed_afresh()
    case = random_case(dtype=torch.float32)
    expected, got = case.outputs("torch"), case.outputs("auto")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_torch_reads_no_memory_that_it_did_not_write() -> None:
    """In deterministic mode torch fills what torch.empty returns with NaN, and refuses ops that are not repeatable."""
    seed_afresh()
    case = random_case(documents=True, inject=True)
    want = {**case.outputs(), **{f"grad {name}": x for name, x in case.gradients().items()}}
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = {**case.outputs(), **{f"grad {name}": x for name, x in case.gradients().items()}}
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[name], want[name]) for name in want)
