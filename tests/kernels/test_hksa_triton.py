"""HKSA's Triton backend against the definition in float64: outputs, leaving memory, and gradients of every input.

In the interpreter on few and small cases that cover every pair of features, on a GPU on more and larger ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotmamba_kernels import SlotState
from slotmamba_kernels.hksa import triton_op
from tests.kernels.hksa_cases import DEVICE, Case
from tests.kernels.hksa_grid import assert_near, choose_stretch, device_case, pairwise, values
from tests.kernels.test_hksa_backends import SHAPES
from tests.seeds import seed_afresh

HALF = [torch.bfloat16, torch.float16]
STRETCHES = (None, 1000, 1, 3)
"""Tokens of a stretch of the sequence that is computed again in the backward pass; None: nothing is."""

FEATURES: dict[str, tuple[Any, ...]] = {
    "activations": (torch.float32, *HALF),
    "documents": (False, True),
    "state": (True, False),
    "surprise": (True, False),
    "inject": (False, True),
    "same_slots": (False, True),
    "stretch": STRETCHES,
    "many_chains": (True, False),
}
SIZES: dict[str, tuple[int, ...]] = {
    "steps": (2, 1, 3, 4),
    "writes": (3, 1, 4, 5),
    "reads": (2, 1, 6, 3),
    "dim": (32, 48),
    "num_slots": (9, 6, 60, 4097),
    "length": (7, 1, 2, 5),
    "heads": (1, 2),
    "batch": (1, 2),
}
if DEVICE == "cuda":
    SIZES |= {
        "writes": (8, 1, 2, 3, 5, 13, 24, 32),
        "reads": (8, 1, 2, 3, 7, 16, 29, 32),
        "dim": (128, 32, 48, 64, 96, 160, 256),
        "num_slots": (64, 32, 37, 4097),
        "length": (37, 1, 2, 16),
        "heads": (2, 1, 3, 8),
    }
GRID = pairwise(SIZES | FEATURES)


def assert_equal_to_reference(case: Case, stretch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, heads, dim = case.tensors["q"].shape
    # The definition copies the whole memory at every token.
    definition = "reference" if batch * length * heads * dim * case.num_slots < 2**26 else "torch"
    assert_near(case, values(case, "triton", **choose_stretch(case, stretch, monkeypatch))[0], definition)


@pytest.mark.parametrize("number", range(len(GRID)))
def test_every_pair_of_features_and_sizes(
    number: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    seed_afresh()
    options = dict(GRID[number])
    print(options)
    if options.pop("many_chains"):
        request.getfixturevalue("many_chains")
    stretch = options.pop("stretch")
    assert_equal_to_reference(device_case(**options), stretch, monkeypatch)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=SHAPES.keys())
def test_shapes_of_the_torch_backend(number: int, monkeypatch: pytest.MonkeyPatch, many_chains: None) -> None:
    """With and without injection and stretches by turns; in the interpreter with fewer streams."""
    seed_afresh()
    options = list(SHAPES.values())[number]
    if DEVICE == "cpu":
        options = options | {"batch": 1, "heads": 1 + number % 2}
    case = device_case(**options, inject=number % 2 == 0)
    assert_equal_to_reference(case, None if number % 3 else 4, monkeypatch)


@pytest.mark.parametrize("half", HALF)
def test_everything_in_half_precision(half: torch.dtype) -> None:
    """Addresses, decay and entering memory too, although a model has them in float32."""
    seed_afresh()
    case = device_case(batch=1, length=5, dim=32, documents=True, inject=True)
    rounded = {name: x.to(half) for name, x in case.tensors.items() if x.is_floating_point()}
    case = case.with_tensors(**rounded)
    assert_near(case, values(case, "triton")[0])


def sparse_addresses(case: Case, num_slots: int) -> Case:
    """The case with its slots scattered over this many."""
    spread = torch.randperm(num_slots, device=DEVICE)[: case.num_slots].int()
    moved = {name: spread[case.tensors[name].long()] for name in ("write_idx", "read_idx")}
    return Case({**case.tensors, **moved}, num_slots, case.doc_start)


@pytest.mark.parametrize("enters", [False, True], ids=["", "dense"])
@pytest.mark.parametrize("stretch", [None, 3], ids=["", "stretches"])
def test_many_slots_of_which_few_are_touched(
    stretch: int | None, enters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4^10 slots on a GPU; into and out of a dense memory, or a sparse one."""
    seed_afresh()
    num_slots = 4**10 if DEVICE == "cuda" else 4**7
    case = device_case(
        batch=1, heads=1, length=7, num_slots=9, dim=32, documents=not enters, inject=enters, state=False
    )
    case = sparse_addresses(case, num_slots)
    if enters:
        memory = SlotState.initial(1, 1, num_slots, 32, device=DEVICE).map(lambda x: x + torch.rand_like(x))
        case = case.entering(memory)
    options = choose_stretch(case, 3 if stretch else None, monkeypatch)
    assert_near(case, values(case, "triton", **options)[0], "torch")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA: too large for the interpreter")
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("skewed", [False, True], ids=["", "skewed"])
def test_at_length(skewed: bool, documents: bool, activations: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model calls it, against the torch backend in float64: sizes at which programs and buckets fill up.

    skewed: all tokens of a head write and read the same slots, in chains of as many writes as tokens.
    """
    seed_afresh()
    case = device_case(
        activations, batch=2, heads=8, length=1021, dim=64, writes=8, reads=8, num_slots=1024, documents=documents,
        same_slots=skewed, extremes=False, inject=not documents,
    )  # fmt: skip
    assert_near(case, values(case, "triton", **choose_stretch(case, None if skewed else 300, monkeypatch))[0], "torch")


def test_sequences_whose_offsets_would_not_fit_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into stretches whose tables are kept, here of two tokens."""
    seed_afresh()
    case = device_case(batch=1, length=5, dim=32, documents=True)
    monkeypatch.setattr(triton_op, "MAX_OFFSET", 2 * 2 * case.tensors["write_w"].shape[-1] * 32)
    assert_near(case, values(case, "triton")[0], "reference")
