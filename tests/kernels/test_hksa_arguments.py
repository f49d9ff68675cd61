"""Values that HKSA refuses; tests of shapes are beside those of the backends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.hksa_cases import random_case
from tests.seeds import seed_afresh


@pytest.mark.parametrize("name", ["write_idx", "read_idx"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_slots_that_do_not_exist_are_refused(name: str, backend: str) -> None:
    seed_afresh()
    for slot in (-1, 9):
        case = random_case(num_slots=9)
        case.tensors[name][0, 0, 0, 0] = slot
        with pytest.raises(ValueError, match=rf"hksa: {name} has slots from .*, expected 0 to 8"):
            case.call(backend)


def test_float_indices_and_document_starts_are_refused() -> None:
    case = random_case(documents=True)
    assert case.doc_start is not None
    case = replace(case, doc_start=case.doc_start.double())
    with pytest.raises(ValueError, match=r"hksa: doc_start has dtype torch\.float64, expected integers"):
        case.call("torch")
