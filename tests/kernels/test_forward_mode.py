"""Forward-mode derivatives through the ops: refused by name, because torch would give zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from slotmamba_kernels import bdlru, hksa, hksa_step_, hksa_threaded, kronecker_topk, linear_cross_entropy, thread_slots
from tests.kernels.hksa_cases import DEVICE, SURPRISE, random_case

SLOTS = 16


def call_hksa(q: Tensor, segment_len: int | None) -> Tensor:
    case = random_case(batch=1, length=4, num_slots=SLOTS, state=False, dtype=torch.float32)
    tensors = {name: x.to(DEVICE) for name, x in case.tensors.items() if name not in ("q", *SURPRISE)}
    a_s, eta = (case.tensors[name].to(DEVICE) for name in SURPRISE)
    options = {"num_slots": SLOTS, "surprise": (a_s, eta), "backend": "triton"}
    if segment_len is None:
        return hksa(q, **tensors, **options)[0]
    return hksa_threaded(q, **tensors, **options, segment_len=segment_len)[0]


def call_step(q: Tensor) -> Tensor:
    state = random_case(batch=1, num_slots=SLOTS, dtype=torch.float32).state
    assert state is not None
    vectors = torch.randn(1, 2, 1, 4, device=DEVICE)
    logits = torch.randn(1, 2, 2, 4, device=DEVICE)
    return hksa_step_(
        q, vectors, vectors, vectors, torch.rand(1, 2, 1, device=DEVICE), logits, logits, torch.ones(2, device=DEVICE),
        state=state.map(lambda x: x.to(DEVICE).contiguous()), top_k=2, backend="triton",
    )  # fmt: skip


def call_thread(bias: Tensor) -> Tensor:
    state = random_case(batch=1, num_slots=SLOTS, dtype=torch.float32).state
    assert state is not None
    own = state.map(lambda x: x.to(DEVICE))
    return thread_slots(own, own.map(lambda x: x / 2), bias, bias, backend="triton").z


def call_bdlru(v: Tensor, backend: str = "triton") -> Tensor:
    gates = torch.linspace(-1, 1, 3 * v.numel(), device=DEVICE).reshape(*v.shape[:2], -1, 2, 3).softmax(-1)
    return bdlru(v, gates, backend=backend)[0]


def call_loss(hidden: Tensor, backend: str) -> Tensor:
    targets = torch.zeros(len(hidden), dtype=torch.int64, device=DEVICE)
    return linear_cross_entropy(hidden, torch.ones(9, hidden.shape[1], device=DEVICE), targets, backend=backend)[0]


# Shape of what is differentiated, and the call.
OPS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "bdlru": ((1, 5, 4), call_bdlru),
    "kronecker_topk": ((3, 2, 4), lambda logits: kronecker_topk(logits, 2, "triton")[1]),
    "hksa_forward": ((1, 4, 2, 4), lambda q: call_hksa(q, None)),
    "hksa_threaded": ((1, 4, 2, 4), lambda q: call_hksa(q, 2)),
    "hksa_step": ((1, 2, 4), call_step),
    "thread_slots": ((2,), call_thread),
    "linear_cross_entropy": ((3, 4), lambda hidden: call_loss(hidden, "triton")),
    "linear_cross_entropy of torch": ((3, 4), lambda hidden: call_loss(hidden, "torch")),
}


@pytest.mark.parametrize("name", OPS)
def test_refused(name: str) -> None:
    shape, call = OPS[name]
    x = torch.rand(shape, device=DEVICE)
    assert call(x).isfinite().all()
    message = rf"slotmamba::{name.split()[0]} has no forward-mode derivative \(jvp\)"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)))


def test_the_backward_op_is_refused() -> None:
    """Of a forward pass that was outside."""
    v = torch.rand(1, 5, 4, device=DEVICE, requires_grad=True)
    h = call_bdlru(v)
    with pytest.raises(NotImplementedError, match="slotmamba::bdlru_backward"), forward_ad.dual_level():
        h.sum().backward()


def test_the_reference_has_them() -> None:
    """In float64, against a difference of two values: h is linear in v."""
    v, tangent = (torch.rand(1, 5, 4, dtype=torch.float64, device=DEVICE) for _ in range(2))
    found = torch.func.jvp(lambda x: call_bdlru(x, "reference"), (v,), (tangent,))[1]
    expected = call_bdlru(v + tangent, "reference") - call_bdlru(v, "reference")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
