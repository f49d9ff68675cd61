"""In which precision HKSA computes what it is given."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.hksa_cases import random_case
from tests.kernels.test_hksa import assert_bitwise_equal, everywhere, exactly
from tests.seeds import seed_afresh

pytestmark = pytest.mark.usefixtures("many_chains")


@exactly
def test_bfloat16_inputs_are_computed_in_float32(backend: str) -> None:
    seed_afresh()
    case = random_case(documents=True, inject=True, dtype=torch.float32)
    rough = {name: case.tensors[name].bfloat16() for name in ("q", "k", "u_k", "u_v", "beta", "c_k", "c_v")}
    exact = case.with_tensors(**{name: x.float() for name, x in rough.items()})
    o, state = case.with_tensors(**rough).call(backend)
    o_exact, state_exact = exact.call(backend)
    assert o.dtype == torch.bfloat16 and torch.equal(o, o_exact.bfloat16())
    assert all(x.dtype == torch.float32 for x in vars(state).values())
    assert_bitwise_equal(vars(state_exact), vars(state))
    for name, gradient in case.with_tensors(**rough).gradients(backend).items():
        assert gradient.dtype == (torch.bfloat16 if name in rough else torch.float32) and gradient.isfinite().all()


@exactly
def test_autocast_changes_nothing(backend: str) -> None:
    seed_afresh()
    case = random_case(documents=True, inject=True, dtype=torch.float32)
    want = case.outputs(backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        got = case.outputs(backend)
    assert_bitwise_equal(want, got)


@everywhere
def test_bfloat16_is_enough_for_the_inputs_but_not_for_the_decay(backend: str) -> None:
    """A weight of 4^-5 moves z although 1 - 4^-5 is 1 in bfloat16."""
    seed_afresh()
    case = random_case(
        num_slots=1, writes=1, reads=1, batch=1, heads=1, length=100, same_slots=True, dtype=torch.float32
    )
    w = torch.full_like(case.tensors["write_w"], 4.0**-5)
    case = case.with_tensors(write_w=w, gamma=torch.ones(1), q=case.tensors["q"].bfloat16())
    _, state = case.call(backend)
    kept = (1 - 4.0**-5) ** 100
    torch.testing.assert_close(state.z, kept * case.tensors["z"] + (1 - kept), rtol=1e-5, atol=0)
