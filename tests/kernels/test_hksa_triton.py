"""HKSA's Triton backend against the definition in float64: outputs, leaving memory, and gradients of every input.

In the interpreter on few and small cases that cover every pair of features, on a GPU on more and larger ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotmamba_kernels.hksa import triton_op
from tests.kernels.hksa_cases import Case
from tests.kernels.hksa_grid import DEVICE, assert_near, device_case, pairwise, values
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


def choose_stretch(case: Case, tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Arguments of hksa for stretches of this many tokens."""
    if tokens is None:
        return {"recompute": False}
    batch, _, heads, dim = case.tensors["q"].shape
    token = batch * heads * case.tensors["write_w"].shape[-1] * 2 * dim * case.tensors["q"].element_size()
    monkeypatch.setattr(triton_op, "RECOMPUTED_BYTES", tokens * token)
    return {"recompute": True}


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
    """With and without injection and recomputation by turns; on a GPU every one with both."""
    seed_afresh()
    options = {"batch": 2 if DEVICE == "cuda" else 1} | list(SHAPES.values())[number]
    case = device_case(**options, inject=DEVICE == "cuda" or number % 2 == 0)
    assert_equal_to_reference(case, None if number % 3 else 4, monkeypatch)
