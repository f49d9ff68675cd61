"""Shapes and values that HKSA refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.hksa_cases import DEVICE, Case, random_case
from tests.kernels.test_hksa import DTYPES, everywhere
from tests.seeds import seed_afresh


@pytest.mark.parametrize("name", ["write_idx", "read_idx"])
@everywhere
def test_slots_that_do_not_exist_are_refused(name: str, backend: str) -> None:
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("looking for them would wait for the GPU")
    seed_afresh()
    for slot in (-1, 9):
        case = random_case(num_slots=9, dtype=DTYPES[backend])
        case.tensors[name][0, 0, 0, 0] = slot
        with pytest.raises(ValueError, match=rf"hksa: {name} has slots from .*, expected 0 to 8"):
            case.call(backend)


def test_float_indices_and_document_starts_are_refused() -> None:
    case = random_case(documents=True)
    assert case.doc_start is not None
    case = replace(case, doc_start=case.doc_start.double())
    with pytest.raises(ValueError, match=r"hksa: doc_start has dtype torch\.float64, expected integers"):
        case.call("torch")


@everywhere
@pytest.mark.parametrize(
    ("changed", "shape", "named"),
    [
        ("q", (2, 5, 2), "q has shape .2, 5, 2., expected .B, T, H, d."),
        ("q", (2, 0, 2, 4), "q"),
        ("q", (2, 5, 2, 3), "k"),  # the first that does not fit it
        ("k", (2, 5, 2, 4), "k has shape .2, 5, 2, 4., expected .B, T, H, n, d."),
        ("k", (2, 5, 2, 0, 4), "k"),
        ("k", (2, 5, 2, 1, 4), "u_k"),
        ("k", (2, 5, 2, 2, 3), "k"),
        ("u_k", (2, 5, 2, 1, 4), "u_k"),
        ("u_v", (2, 4, 2, 2, 4), "u_v"),
        ("beta", (2, 5, 2), "beta"),
        ("beta", (2, 5, 2, 3), "beta"),
        ("write_idx", (2, 5, 2), "write_idx"),
        ("write_idx", (2, 5, 1, 3), "write_idx"),
        ("write_idx", (2, 5, 2, 0), "write_idx"),
        ("write_idx", (2, 5, 2, 10), "write_idx has 10 active slots a token, more than num_slots=9"),
        ("write_w", (2, 5, 2, 2), "write_w"),
        ("read_idx", (2, 5, 2), "read_idx"),
        ("read_idx", (2, 5, 2, 0), "read_idx"),
        ("read_idx", (2, 5, 2, 10), "read_idx has 10 active slots a token, more than num_slots=9"),
        ("read_w", (1, 5, 2, 2), "read_w"),
        ("gamma", (1,), "gamma"),
        ("gamma", (2, 1), "gamma"),
        ("S_k", (2, 2, 8, 4), "state.S_k"),
        ("S_v", (1, 2, 9, 4), "state.S_v"),
        ("z", (2, 2, 9, 1), "state.z"),
        ("surprise", (2, 2, 8), "state.surprise"),
        ("a_s", (), "surprise a_s"),
        ("eta", (3,), "surprise eta"),
        ("c_k", (2, 5, 2, 2, 4), "inject c_k"),
        ("c_v", (2, 5, 2, 4), "inject c_v"),
        ("lam_k", (2, 5, 2, 3, 1), "inject lam_k"),
        ("lam_v", (2, 5, 2, 2), "inject lam_v"),
        ("doc_start", (5,), "doc_start"),
        ("doc_start", (2, 6), "doc_start"),
    ],
)
def test_wrong_shapes_are_refused_by_name(backend: str, changed: str, shape: tuple[int, ...], named: str) -> None:
    case = random_case(length=5, inject=True, dtype=DTYPES[backend])
    if changed == "doc_start":
        case = Case(case.tensors, 9, torch.zeros(shape, dtype=torch.long))
    else:
        case = case.with_tensors(**{changed: torch.zeros(shape, dtype=case.tensors[changed].dtype)})
    with pytest.raises(ValueError, match=f"^hksa: {named}"):
        case.call(backend)


@everywhere
def test_unknown_backends_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=f"unknown backend '{backend}s', expected one of auto, reference, torch"):
        random_case(dtype=DTYPES[backend]).call(f"{backend}s")
