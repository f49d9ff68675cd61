"""Threading's fused kernels against the definition in float64, dense and sparse (hksa.md section 4)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slotmamba_kernels import SlotState, thread_slots
from slotmamba_kernels.hksa.state import SparseSlotState
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.seeds import seed_afresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATE = ("S_k", "S_v", "z", "surprise")

# B, H, M, d: one of everything, odd sizes, several programs a stream of which the last is not full, d = 256.
SIZES = [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 70, 32), (2, 1, 13, 256), (1, 1, 1030, 2)]
if DEVICE == "cuda":
    SIZES += [(4, 8, 1024, 128), (2, 4, 4097, 64)]


def random_state(batch: int, heads: int, rows: int, dim: int) -> SlotState:
    """Some slots without surprise, some with much of it."""
    scores = (batch, heads, rows)
    surprise = (2 * torch.randn(scores)).exp() * (torch.rand(scores) < 0.8)
    state = SlotState(torch.randn(*scores, dim), torch.randn(*scores, dim), torch.rand(scores) + 0.1, surprise)
    return state.map(lambda x: x.to(DEVICE))


def random_sparse_states(
    batch: int, heads: int, num_slots: int, dim: int, *, rows: tuple[int, int]
) -> list[SparseSlotState]:
    """Two that have slots in common. Each stream holds between none and `rows` slots; fillings hold NaN."""
    some = torch.randperm(num_slots)[:60]

    def one(rows: int) -> SparseSlotState:
        slots = torch.full((batch, heads, rows), num_slots, dtype=torch.int32)
        for stream in slots.view(-1, rows):
            held = int(torch.randint(0, min(rows, len(some)) + 1, ()))
            stream[:held] = some[torch.randperm(len(some))[:held]].sort().values
        slots = slots.to(DEVICE)
        filling = slots == num_slots
        state = random_state(batch, heads, rows, dim)
        state = state.map(lambda x: x.masked_fill(filling if x.ndim == 3 else filling.unsqueeze(-1), torch.nan))
        return SparseSlotState(**vars(state), slots=slots, slots_in_all=num_slots)

    return [one(count) for count in rows]


def random_gate(heads: int) -> tuple[Tensor, Tensor]:
    return torch.randn(heads, device=DEVICE), torch.randn(heads, device=DEVICE)


def double(x: Tensor) -> Tensor:
    return x.double()


def combination(state: SlotState) -> list[Tensor]:
    """The same random float64 factors of every number of S_k, S_v, z and surprise each time."""
    generator = torch.Generator().manual_seed(7)
    tensors = vars(state).values()
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(DEVICE) for x in tensors]


def run(
    own: SlotState, below: SlotState, gate: tuple[Tensor, Tensor], backend: str
) -> tuple[SlotState, dict[str, Tensor]]:
    """The mix, and the gradients of all inputs for a fixed random combination of the mix's dense rows."""
    leaves = {
        **{f"own {name}": getattr(own, name) for name in STATE},
        **{f"below {name}": getattr(below, name) for name in STATE},
        **dict(zip(("bias", "slope"), gate, strict=True)),
    }
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    values = iter(leaves.values())
    own, below = (state.map(lambda x: next(values)) for state in (own, below))
    mixed = thread_slots(own, below, next(values), next(values), backend=backend)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for x, factors in zip(vars(mixed.dense()).values(), combination(mixed.dense()), strict=True):
        loss = loss + (x.double() * factors).sum()
    return mixed, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], scales: dict[str, Tensor]) -> None:
    """Within 1e-5 of the largest magnitude, or of 1 if that is larger; within 1e-6 of `scales` where there is one."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        difference = (got[name].double() - expected).detach().abs()
        largest = expected.detach().abs().max().clamp(min=1.0)
        bound = 1e-6 * scales[name] if name in scales else 1e-5 * largest
        assert bool((difference <= bound).all()), f"{name}: off by {difference}, more than {bound}"


def sums_of_magnitudes(own: SlotState, below: SlotState, gate: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of the terms of a head's gradients, which are sums over all slots and may cancel out: rounding is relative to
    these, and more of it the larger what the gate is the sigmoid of. The logarithm of a surprise near 1 is near 0, but
    as uncertain as others; where a gate is almost 1, float64 knows little of what is missing."""
    logarithm = (own.surprise + 1e-6).log()
    bias, slope = (x.view(-1, 1) for x in gate)
    share = (bias + slope * logarithm).sigmoid()
    magnitude = torch.zeros_like(share)
    for mine, other, factors in zip(vars(own).values(), vars(below).values(), combination(own), strict=True):
        terms = (factors * (mine - other)).abs()
        magnitude += terms.sum(-1) if terms.ndim == 4 else terms
    size = logarithm.abs() + 1
    magnitude *= (share * (1 - share) + 1e-9) * (1 + bias.abs() + slope.abs() * size)
    return {"bias": magnitude.sum((0, 2)), "slope": (magnitude * size).sum((0, 2))}


def assert_right(own: SlotState, below: SlotState, gate: tuple[Tensor, Tensor]) -> SlotState:
    """Mix and gradients equal those of the definition in float64. Returns the mix."""
    mixed, gradients = run(own, below, gate, "triton")
    own, below, gate = own.map(double), below.map(double), (gate[0].double(), gate[1].double())
    want, expected = run(own, below, gate, "torch")
    assert_close(vars(mixed.dense()), vars(want), {})
    assert_close(gradients, expected, sums_of_magnitudes(own.dense(), below.dense(), gate))
    return mixed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dense_memories(sizes: tuple[int, int, int, int]) -> None:
    seed_afresh()
    mixed = assert_right(random_state(*sizes), random_state(*sizes), random_gate(sizes[1]))
    assert not isinstance(mixed, SparseSlotState) and all(x.dtype == torch.float32 for x in vars(mixed).values())


@pytest.mark.parametrize("rows", [(1, 1), (9, 9), (3, 17), (70, 55)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 40, 5), (1, 1, 4**8, 2)], ids=["M=40", "M=4^8"])
def test_sparse_memories(sizes: tuple[int, int, int, int], rows: tuple[int, int]) -> None:
    """Slots that both, one or none of the two hold; whatever is in rows that only fill a memory up."""
    seed_afresh()
    own, below = random_sparse_states(*sizes, rows=rows)
    mixed = assert_right(own, below, random_gate(sizes[1]))
    assert isinstance(mixed, SparseSlotState)
    most = 1
    for mine, other, both in zip(*(state.slots.flatten(0, 1).tolist() for state in (own, below, mixed)), strict=True):
        held = sorted({*mine, *other} - {sizes[2]})
        assert both == held + [sizes[2]] * (len(both) - len(held))
        most = max(most, len(held))
    assert mixed.slots.shape[-1] < most + 16


@pytest.mark.parametrize("own_is_sparse", [True, False])
def test_one_dense_and_one_sparse_memory(own_is_sparse: bool) -> None:
    seed_afresh()
    sparse, dense = random_sparse_states(2, 2, 11, 4, rows=(6, 6))[0], random_state(2, 2, 11, 4)
    own, below = (sparse, dense) if own_is_sparse else (dense, sparse)
    mixed = assert_right(own, below, random_gate(2))
    assert not isinstance(mixed, SparseSlotState)


def test_memories_without_any_slot() -> None:
    seed_afresh()
    own, below = random_sparse_states(2, 2, 11, 4, rows=(3, 3))
    for state in (own, below):
        state.slots.fill_(11)
    mixed = assert_right(own, below, random_gate(2)).dense()
    torch.testing.assert_close(mixed.z, torch.full_like(mixed.z, 1 / 11))
    assert not any(x.any() for x in (mixed.S_k, mixed.S_v, mixed.surprise))


def test_gates_at_their_ends() -> None:
    """Large parameters: all of one memory, bitwise, and finite gradients."""
    seed_afresh()
    own, below = random_state(1, 2, 9, 4), random_state(1, 2, 9, 4)
    ends = torch.tensor([200.0, -200.0], device=DEVICE)
    mixed, gradients = run(own, below, (ends, torch.zeros_like(ends)), "triton")
    for name in STATE:
        assert torch.equal(getattr(mixed, name)[:, 0], getattr(own, name)[:, 0])
        assert torch.equal(getattr(mixed, name)[:, 1], getattr(below, name)[:, 1])
    assert all(x.isfinite().all() for x in gradients.values())


def test_memories_that_are_not_contiguous() -> None:
    seed_afresh()
    own, below = (random_state(2, 3, 9, 4).map(lambda x: x.transpose(0, 1)) for _ in range(2))
    assert_right(own, below, random_gate(2))


def test_all_is_written_and_repeats_bitwise() -> None:
    """In deterministic mode torch fills what torch.empty returns with NaN."""
    seed_afresh()
    dense = random_state(2, 2, 35, 40), random_state(2, 2, 35, 40)
    for own, below in (dense, random_sparse_states(2, 2, 40, 40, rows=(30, 25))):
        gate = random_gate(2)
        first, gradients = run(own, below, gate, "triton")
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(3, device=DEVICE).isnan().all()
            second, gradients_again = run(own, below, gate, "triton")
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in STATE)
        assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
        assert all(x.isfinite().all() for x in gradients.values())


def op_arguments(*, sparse: bool) -> tuple[Any, ...]:
    own, below = random_state(2, 2, 5, 4), random_state(2, 2, 6 if sparse else 5, 4)
    tensors = [x.requires_grad_() for state in (own, below) for x in vars(state).values()]
    rows: list[Tensor | None] = [None, None]
    if sparse:
        rows = [torch.tensor(row, dtype=torch.int32, device=DEVICE).expand(2, 2, 4).contiguous()
                for row in ([0, -1, 3, -1], [5, 0, -1, -1])]  # fmt: skip
    return (*tensors, *(x.requires_grad_() for x in random_gate(2)), *rows, 9)


@pytest.mark.parametrize("sparse", [False, True])
def test_opcheck(sparse: bool) -> None:
    from slotmamba_kernels.threading.fused import thread_slots_backward, thread_slots_op

    seed_afresh()
    arguments = op_arguments(sparse=sparse)
    torch.library.opcheck(thread_slots_op, arguments)
    grads = [torch.randn_like(x) for x in thread_slots_op(*arguments)]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(thread_slots_backward, (*grads, *detached))


def test_autocast_and_activation_checkpointing_change_nothing() -> None:
    seed_afresh()
    own, below = (random_state(2, 2, 9, 4).map(lambda x: x.requires_grad_()) for _ in range(2))
    bias, slope = random_gate(2)

    def mix() -> tuple[Tensor, ...]:
        return tuple(vars(thread_slots(own, below, bias, slope, backend="triton")).values())

    want = mix()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = checkpoint(mix, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    leaves = [x for state in (own, below) for x in vars(state).values()]
    for a, b in zip(*(torch.autograd.grad([x.sum() for x in mixed], leaves) for mixed in (want, got)), strict=True):
        assert torch.equal(a, b)


def test_is_compiled_whole() -> None:
    """Of dense memories; to count the slots of sparse ones, the graph has to be left."""
    seed_afresh()
    own, below = (random_state(2, 2, 9, 4).map(lambda x: x.requires_grad_()) for _ in range(2))
    bias, slope = (x.requires_grad_() for x in random_gate(2))

    def total(S_k: Tensor, S_v: Tensor, z: Tensor, surprise: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
        mixed = thread_slots(SlotState(S_k, S_v, z, surprise), below, bias, slope, backend="triton")
        # Not by vars(), which torch.compile of torch 2.11 does not follow.
        return torch.stack([x.sum() for x in (mixed.S_k, mixed.S_v, mixed.z, mixed.surprise)]).sum()

    leaves = (*vars(own).values(), bias, slope)
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    want, got = (torch.autograd.grad(function(*leaves), leaves) for function in (total, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("changes", [{"heads": 1}, {"rows": 4}, {"dim": 3}, {"batch": 1}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_memories_that_do_not_fit_are_refused(backend: str, changes: dict[str, int]) -> None:
    sizes = {"batch": 2, "heads": 2, "rows": 5, "dim": 4}
    own, below = random_state(**sizes), random_state(**{**sizes, **changes})
    with pytest.raises(ValueError, match=r"thread_slots: below has B, H, M, d = .*, own has \(2, 2, 5, 4\)"):
        thread_slots(own, below, *random_gate(2), backend=backend)
    with pytest.raises(ValueError, match=r"thread_slots: bias has shape \(3,\), expected \(2,\)"):
        thread_slots(own, own, *random_gate(3), backend=backend)


def test_float64_on_triton_is_refused() -> None:
    state = random_state(1, 1, 2, 3).map(double)
    with pytest.raises(ValueError, match="thread_slots: backend 'triton' takes float32, bfloat16 or float16"):
        thread_slots(state, state, *random_gate(1), backend="triton")


def call_sparse(dim: int) -> None:
    from slotmamba_kernels.threading.fused import thread_slots_backward, thread_slots_op

    rows = torch.zeros(2, 2, 16, dtype=torch.int32)
    state = [torch.zeros(2, 2, 7, dim), torch.zeros(2, 2, 7, dim), torch.zeros(2, 2, 7), torch.zeros(2, 2, 7)]
    arguments = (*state, *state, torch.zeros(2), torch.zeros(2), rows, rows, 4**10)
    mixed = thread_slots_op(*arguments)
    thread_slots_backward(*mixed, *arguments)


def call_dense(dim: int) -> None:
    state = SlotState.initial(2, 2, 64, dim).map(lambda x: x.requires_grad_())
    mixed = thread_slots(state, state, torch.zeros(2, requires_grad=True), torch.zeros(2), backend="triton")
    torch.autograd.grad([x.sum() for x in vars(mixed).values()], state.S_k)


CALLS = {
    **{f"sparse {dim}": partial(call_sparse, dim) for dim in (1, 128)},
    **{f"dense {dim}": partial(call_dense, dim) for dim in (48, 256)},
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_ahead_of_time(architecture: int) -> None:
    kernels = compile_in_subprocess(architecture, "tests.kernels.test_threading_triton:CALLS")
    assert kernels == ["mix_backward", "mix_forward"]
