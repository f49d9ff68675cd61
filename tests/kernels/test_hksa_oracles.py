"""HKSA where it is another, published layer: against the plain loops of the package fla-core.

- One slot and K = 1: the delta rule, gated or not, and the gated delta product. HKSA's memory is a vector where theirs
  is a matrix of keys times values, and the matrix's columns do not mix: with u = k * v_c, a slot is column c. So HKSA's
  heads are the columns, two a head, in S_v and in S_k. The step is w * beta, the decay (1 - w)^gamma; the read of a
  single slot is S_v / z, and q . S_v their output.
- K = M with the same fixed addresses for all tokens: gated slot attention. A slot decays with alpha and takes 1 - alpha
  of what is written: gamma = 1, alpha = 1 - w. Nothing is removed: k = 0, beta = 1. Started at z = 1, the normaliser
  stays (1 - w) 1 + w = 1, and equal read weights leave the softmax alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba_kernels import SlotState, hksa
from tests.seeds import seed_afresh

# Backend, dtype of its inputs, and how far it may be from the loops relative to the largest entry.
BACKENDS = [("reference", torch.float64, 1e-10), ("torch", torch.float64, 1e-10)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda":  # the interpreter would take minutes for the columns of a state as heads
    BACKENDS.append(("triton", torch.float32, 1e-5))
BATCH, LENGTH, HEADS, DIM = 2, 13, 3, 32

pytestmark = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core, of the dev extra")

Backend = tuple[str, torch.dtype, float]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend[0])
def backend(request: pytest.FixtureRequest) -> Backend:
    seed_afresh()
    return request.param


def loop(module: str, name: str) -> Callable[..., Any]:
    """One of fla's loops, in float64: they begin by casting everything with `Tensor.float`."""
    function = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)

    def in_double(*arguments: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return function(*arguments, **options)

    return in_double


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return (low + (high - low) * torch.rand(shape, dtype=torch.float64, device=DEVICE)).requires_grad_()


def assert_same(wanted: dict[str, Tensor], got: dict[str, Tensor], leaves: dict[str, Tensor], tolerance: float) -> None:
    """The outputs, and the gradients that a random combination of them gives to the leaves."""
    gradients = []
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in wanted.items()}
    for outputs in (wanted, got):
        loss = torch.stack([(x * weights[name].to(x)).sum().double() for name, x in outputs.items()]).sum()
        gradients.append(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True))
    pairs = {name: (x, got[name]) for name, x in wanted.items()}
    pairs |= {f"gradient of {name}": pair for name, pair in zip(leaves, zip(*gradients, strict=True), strict=True)}
    for name, (want, have) in pairs.items():
        scale = float(want.detach().abs().max())
        difference = float((have - want).detach().abs().max())
        assert scale > 0 and difference <= tolerance * scale, f"{name}: off by {difference:.2e}, largest {scale:.2e}"


def one_slot(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, w: Tensor, gamma: Tensor
) -> dict[str, Tensor]:
    """HKSA with a single slot, on the columns of a delta rule's state.

    q [B, T, H, d], k [B, T, H, n, d], v [B, T, H, n, 2C], beta [B, T, H, n], w [B, T, H], gamma [H]. Returns the
    outputs of the first C columns, [B, T, H, C], and the state that leaves, [B, H, d, 2C]: the first C columns are
    value memories, the others key memories.
    """
    name, dtype, _ = backend
    columns = v.shape[-1] // 2

    def by_column(x: Tensor) -> Tensor:
        """[B, T, H, ...] once for each column, as heads: [B, T, H * C, ...]."""
        return x.unsqueeze(3).expand(*x.shape[:3], columns, *x.shape[3:]).flatten(2, 3).to(dtype)

    # [B, T, H, n, 2C, d] -> [B, T, H, C, n, d] each
    u_v, u_k = (k.unsqueeze(-2) * v.unsqueeze(-1)).movedim(4, 3).chunk(2, 3)
    address = torch.zeros(*q.shape[:2], q.shape[2] * columns, 1, dtype=torch.int32, device=DEVICE)
    weight = by_column(w).unsqueeze(-1)
    o, state = hksa(
        by_column(q), by_column(k), u_k.flatten(2, 3).to(dtype), u_v.flatten(2, 3).to(dtype), by_column(beta),
        address, weight, address, torch.ones_like(weight), gamma.repeat_interleave(columns).to(dtype),
        num_slots=1, backend=name,
    )  # fmt: skip
    z = torch.ones_like(w[:, 0])
    read = []
    for t in range(w.shape[1]):
        z = (1 - w[:, t].clamp(max=0.999)) ** gamma * z + w[:, t]
        contents = o[:, t].unflatten(1, (-1, columns))  # [B, H, C, d], of the value memory
        read.append(torch.einsum("bhd,bhcd->bhc", q[:, t], contents.double()) * z.unsqueeze(-1))
    leaving = torch.cat([x.squeeze(2).unflatten(1, (-1, columns)) for x in (state.S_v, state.S_k)], 2)
    return {"o": torch.stack(read, 1), "state": leaving.transpose(2, 3)}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_one_slot_is_the_gated_delta_product(backend: Backend, steps: int, gated: bool) -> None:
    """For n = 1 the gated delta rule. The loop keeps its output, but not its state, in float32."""
    product = loop("gated_delta_product", "naive_recurrent_gated_delta_product")
    q, k = normal(BATCH, LENGTH, HEADS, DIM), normal(BATCH, LENGTH, HEADS, steps, DIM)
    v = normal(BATCH, LENGTH, HEADS, steps, 6)
    beta = uniform(BATCH, LENGTH, HEADS, steps, high=2.0)
    w = uniform(BATCH, LENGTH, HEADS, low=0.05, high=0.95) if gated else torch.ones(BATCH, LENGTH, HEADS).to(q)
    gamma = uniform(HEADS, high=2.0) if gated else torch.zeros(HEADS).to(q)
    unit = F.normalize(k, dim=-1)

    def by_step(x: Tensor) -> Tensor:
        """[B, T, H, n, ...] -> [B, T * n, H, ...]."""
        return x.movedim(3, 2).flatten(1, 2)

    o, state = product(
        q, by_step(unit), by_step(v), gamma * torch.log1p(-w) if gated else None, by_step(beta * w.unsqueeze(-1)),
        scale=1.0, output_final_state=True, num_householder=steps,
    )  # fmt: skip
    got = one_slot(backend, q, unit, v, beta, w, gamma)
    leaves = {"k": k, "v": v, "beta": beta, **({"w": w, "gamma": gamma} if gated else {})}
    assert_same({"state": state}, {"state": got["state"]}, leaves, backend[2])
    scale = float(o.detach().abs().max())
    assert float((o[..., :3] - got["o"]).detach().abs().max()) < max(backend[2], 1e-6) * scale


def test_one_slot_is_the_delta_rule(backend: Backend) -> None:
    """w = 1, gamma = 0: outputs too in float64, token by token."""
    rule = loop("delta_rule", "delta_rule_recurrence")
    q, k = normal(BATCH, LENGTH, HEADS, DIM), normal(BATCH, LENGTH, HEADS, DIM)
    v, beta = normal(BATCH, LENGTH, HEADS, 4), uniform(BATCH, LENGTH, HEADS, high=2.0)
    unit = F.normalize(k, dim=-1)
    o, state = rule(*(x.transpose(1, 2) for x in (q * DIM**0.5, unit, v, beta)))
    got = one_slot(
        backend, q, unit.unsqueeze(3), v.unsqueeze(3), beta.unsqueeze(3),
        torch.ones(BATCH, LENGTH, HEADS).to(q), torch.zeros(HEADS).to(q),
    )  # fmt: skip
    wanted = {"o": o.transpose(1, 2)[..., :2], "state": state}
    assert_same(wanted, got, {"q": q, "k": k, "v": v, "beta": beta}, backend[2])


def test_one_slot_is_the_gated_delta_rule_in_float32(backend: Backend) -> None:
    """fla's own loop for it, which casts to float32 in a way that cannot be turned off."""
    rule = importlib.import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    q, k = normal(BATCH, LENGTH, HEADS, DIM), normal(BATCH, LENGTH, HEADS, DIM)
    v, beta = normal(BATCH, LENGTH, HEADS, 4), uniform(BATCH, LENGTH, HEADS, high=2.0)
    w, gamma = uniform(BATCH, LENGTH, HEADS, low=0.05, high=0.95), uniform(HEADS, high=2.0)
    unit = F.normalize(k, dim=-1)
    o, state = rule(q, unit, v, beta * w, gamma * torch.log1p(-w), scale=1.0, output_final_state=True)
    got = one_slot(backend, q, unit.unsqueeze(3), v.unsqueeze(3), beta.unsqueeze(3), w, gamma)
    leaves = {"q": q, "k": k, "v": v, "beta": beta, "w": w, "gamma": gamma}
    assert_same({"o": o[..., :2], "state": state}, got, leaves, 1e-5)


@pytest.mark.parametrize("slots", [2, 7, 16])
def test_all_slots_with_fixed_addresses_are_gated_slot_attention(backend: Backend, slots: int) -> None:
    attention = loop("gsa", "naive_recurrent_gsa")
    name, dtype, tolerance = backend
    rows = (BATCH, LENGTH, HEADS)
    q, key, value = (normal(*rows, DIM) for _ in range(3))
    w = uniform(*rows, slots, low=0.05, high=0.95)
    o, (keys, values) = attention(q, key, value, w, torch.log1p(-w), output_final_state=True)

    order = torch.randperm(slots, device=DEVICE).int()  # the addresses' order is not the slots'
    address = order.expand(*rows, slots).contiguous()
    empty = torch.zeros(BATCH, HEADS, slots, DIM, dtype=dtype, device=DEVICE)
    got, state = hksa(
        q.to(dtype), torch.zeros(*rows, 1, DIM, dtype=dtype, device=DEVICE),
        key.unsqueeze(3).to(dtype), value.unsqueeze(3).to(dtype), torch.ones(*rows, 1, dtype=dtype, device=DEVICE),
        address, w[..., order.long()].to(dtype), address, torch.full_like(w, 0.3, dtype=dtype),
        torch.ones(HEADS, dtype=dtype, device=DEVICE),
        num_slots=slots, state=SlotState(empty, empty, torch.ones_like(empty[..., 0]), torch.zeros_like(empty[..., 0])),
        backend=name,
    )  # fmt: skip
    assert_same(
        {"o": o, "keys": keys.transpose(2, 3), "values": values},
        {"o": got, "keys": state.S_k, "values": state.S_v},
        {"q": q, "key": key, "value": value, "w": w},
        tolerance,
    )
    torch.testing.assert_close(state.z, torch.ones_like(state.z), rtol=0, atol=tolerance)
