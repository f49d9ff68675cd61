"""What HKSA promises (hksa.md, sections 2, 3 and 6), each against something written here independently of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slotmamba_kernels import SlotState
from tests.kernels.hksa_cases import STATE, Case, assert_equal_to, random_case, random_documents, weighted_sum
from tests.seeds import seed_afresh

# Backends in whose own precision a test means something: float64, or also the float32 of the Triton kernels.
exactly = pytest.mark.parametrize("backend", ["reference", "torch"])
everywhere = pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
pytestmark = pytest.mark.usefixtures("many_chains")

DTYPES = {"reference": torch.float64, "torch": torch.float64, "triton": torch.float32}
TOLERANCES = {"reference": 1e-12, "torch": 1e-12, "triton": 1e-5}


def written_slots(case: Case) -> Tensor:
    """Which slots are active in some write of the call, [B, H, M]."""
    index = case.tensors["write_idx"].long()
    batch, _, heads, _ = index.shape
    written = torch.zeros(batch, heads, case.num_slots, dtype=torch.bool)
    return written.scatter(2, index.transpose(1, 2).flatten(2), True)


def in_float64(outputs: tuple[Tensor, SlotState]) -> tuple[Tensor, SlotState]:
    o, state = outputs
    return o.double(), state.map(lambda x: x.double())


def assert_bitwise_equal(want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


# The write


@exactly
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_slot_is_never_longer_than_its_normaliser_allows(backend: str, steps: int, dtype: torch.dtype) -> None:
    """|S| <= z * 2n * max|u|, lengths of vectors; the slack is for rounding."""
    seed_afresh()
    for _ in range(5):
        case = random_case(
            length=60,
            steps=steps,
            num_slots=4,
            state=False,
            same_slots=True,
            documents=bool(torch.rand(()) < 0.5),
            dtype=dtype,
        )
        case = case.with_tensors(beta=2 * torch.rand_like(case.tensors["beta"]).sqrt())
        _, state = case.call(backend)
        for memory, u in ((state.S_k, case.tensors["u_k"]), (state.S_v, case.tensors["u_v"])):
            bound = state.z * 2 * steps * u.norm(dim=-1).max()
            assert bool((memory.norm(dim=-1) <= bound * (1 + 1e-5)).all())


@everywhere
def test_slots_that_are_not_written_keep_their_state_bitwise(backend: str) -> None:
    seed_afresh()
    case = random_case(num_slots=60, dtype=torch.float32)
    _, leaving = case.call(backend)
    idle = ~written_slots(case)
    assert idle.any() and not idle.all() and case.state is not None
    for before, after in zip(vars(case.state).values(), vars(leaving).values(), strict=True):
        assert torch.equal(before[idle], after[idle])
        assert not torch.equal(before[~idle], after[~idle])


@everywhere
def test_slots_that_a_new_document_does_not_write_are_as_at_the_start(backend: str) -> None:
    seed_afresh()
    case = random_case(num_slots=60, dtype=torch.float32, inject=True)
    doc_start = torch.zeros(2, 13, dtype=torch.long)
    doc_start[:, 9:] = 9
    _, leaving = Case(case.tensors, 60, doc_start).call(backend)
    idle = ~written_slots(case.span(9, 13))
    assert idle.any()
    assert not leaving.S_k[idle].any() and not leaving.S_v[idle].any() and not leaving.surprise[idle].any()
    assert (leaving.z[idle] == torch.tensor(1 / 60)).all()


@everywhere
@pytest.mark.parametrize("inject", [False, True], ids=["", "inject"])
def test_writes_of_weight_zero_change_nothing_bitwise(backend: str, inject: bool) -> None:
    seed_afresh()
    case = random_case(inject=inject, dtype=torch.float32)
    idle = case.with_tensors(write_w=torch.zeros_like(case.tensors["write_w"]))
    assert case.state is not None
    assert_bitwise_equal(vars(case.state), vars(idle.call(backend)[1]))


@everywhere
@pytest.mark.parametrize("inject", [False, True], ids=["", "inject"])
def test_tokens_of_weight_zero_might_as_well_not_be_there(backend: str, inject: bool) -> None:
    seed_afresh()
    case = random_case(length=12, inject=inject, dtype=DTYPES[backend])
    w = case.tensors["write_w"].clone()
    w[:, 3:7] = 0
    o, state = case.with_tensors(write_w=w).call(backend)
    start, shortened = case.span(0, 3), case.span(7, 12)
    o_start, between = start.call(backend)
    o_end, leaving = shortened.entering(between).call(backend)
    assert_equal_to(
        {"o": torch.cat([o_start, o_end], 1), **vars(leaving)},
        {"o": o[:, [0, 1, 2, *range(7, 12)]], **vars(state)},
        max(1e-10, TOLERANCES[backend]),
    )


@everywhere
def test_no_prediction_error_reaches_what_was_predicted(backend: str) -> None:
    """Surprise has gradients in a_s, eta, the write weights and itself, none in S, u, z, which the error is made of."""
    seed_afresh()
    case = random_case(extremes=False, dtype=DTYPES[backend])
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    leaving = case.with_tensors(**leaves).call(backend)[1].surprise
    gradients = torch.autograd.grad(
        (leaving * torch.randn_like(leaving)).sum(), list(leaves.values()), allow_unused=True
    )
    reached = {name for name, x in zip(leaves, gradients, strict=True) if x is not None and bool(x.any())}
    assert reached == {"a_s", "eta", "write_w", "surprise"}


@exactly
def test_without_surprise_it_stays_as_it_is(backend: str) -> None:
    seed_afresh()
    case = random_case(surprise=False)
    with_it = random_case(surprise=True).tensors
    assert torch.equal(case.call(backend)[1].surprise, case.tensors["surprise"])
    got = case.with_tensors(a_s=with_it["a_s"], eta=with_it["eta"]).outputs(backend)
    expected = case.outputs(backend)
    assert not torch.equal(got.pop("surprise"), expected.pop("surprise"))
    assert_bitwise_equal(expected, got)


# The memories that it contains


@everywhere
def test_without_keys_it_is_pdma(backend: str) -> None:
    """k = 0 and q = 0: RAM-Net's power decay moving average (arXiv:2602.11958, equation 7), over all M slots densely.

    The address of a read is renormalised over the slots that are read: the softmax of the logarithms of its weights.
    """
    seed_afresh()
    case = random_case(steps=1, state=False, surprise=False, extremes=False, dtype=DTYPES[backend])
    tensors = case.tensors
    case = case.with_tensors(
        k=torch.zeros_like(tensors["k"]),
        q=torch.zeros_like(tensors["q"]),
        beta=torch.ones_like(tensors["beta"]),
        write_w=0.999 * tensors["write_w"],
    )
    o, state = in_float64(case.call(backend))
    tensors = case.double().tensors
    for b in range(2):
        for h in range(2):
            memory, z = torch.zeros(9, 4, dtype=torch.float64), torch.full((9,), 1 / 9, dtype=torch.float64)
            for t in range(13):
                w, r = torch.zeros(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
                w[tensors["write_idx"][b, t, h].long()] = tensors["write_w"][b, t, h]
                r[tensors["read_idx"][b, t, h].long()] = tensors["read_w"][b, t, h]
                decay = (1 - w) ** tensors["gamma"][h]
                memory = decay.diag() @ memory + torch.outer(w, tensors["u_v"][b, t, h, 0])
                z = decay * z + w
                expected = (r / r.sum()) @ (z.reciprocal().diag() @ memory)
                torch.testing.assert_close(o[b, t, h], expected, rtol=0, atol=TOLERANCES[backend])
            torch.testing.assert_close(state.S_v[b, h], memory, rtol=0, atol=TOLERANCES[backend])
            torch.testing.assert_close(state.z[b, h], z, rtol=0, atol=TOLERANCES[backend])


@everywhere
def test_one_slot_without_decay_is_the_delta_rule(backend: str) -> None:
    """w = 1, gamma = 0, u = c k: one step of gradient descent of size beta on (k . S - c)^2 / 2."""
    seed_afresh()
    dtype, tolerance = DTYPES[backend], TOLERANCES[backend]
    case = random_case(
        steps=1, writes=1, reads=1, num_slots=1, state=False, surprise=False, extremes=False, dtype=dtype
    )  # fmt: skip
    k, beta = case.tensors["k"], case.tensors["beta"]
    c_k, c_v = torch.randn(2, *beta.shape, 1, dtype=dtype)
    case = case.with_tensors(
        u_k=c_k * k,
        u_v=c_v * k,
        write_w=torch.ones_like(case.tensors["write_w"]),
        gamma=torch.zeros_like(case.tensors["gamma"]),
    )
    o, state = in_float64(case.call(backend))
    k, beta, c_k, c_v = (x.double() for x in (k, beta, c_k, c_v))
    for b in range(2):
        for h in range(2):
            for targets, left in ((c_k, state.S_k), (c_v, state.S_v)):
                memory = torch.zeros(4, dtype=torch.float64)
                for t in range(13):
                    key = k[b, t, h, 0]
                    error = torch.dot(key, memory) - targets[b, t, h, 0, 0]
                    memory = memory - beta[b, t, h, 0] * error * key
                torch.testing.assert_close(left[b, h, 0], memory, rtol=0, atol=tolerance)
    # Nothing decays: the normaliser counts 1/M = 1 and the tokens, and the only slot is read whole.
    torch.testing.assert_close(state.z, torch.full_like(state.z, 14), rtol=0, atol=tolerance)
    torch.testing.assert_close(o[:, -1], state.S_v[:, :, 0] / 14, rtol=0, atol=tolerance)


@everywhere
def test_step_of_two_is_a_reflection(backend: str) -> None:
    """beta * w = 2, u = 0, gamma = 0: S is mirrored at the plane across k, and mirrored back by the same step again."""
    seed_afresh()
    tolerance = TOLERANCES[backend]
    case = random_case(
        length=1, steps=1, writes=1, reads=1, num_slots=1, surprise=False, extremes=False, dtype=DTYPES[backend]
    )  # fmt: skip
    zeros, ones = torch.zeros_like(case.tensors["u_k"]), torch.ones_like(case.tensors["write_w"])
    case = case.with_tensors(
        u_k=zeros, u_v=zeros, write_w=ones, beta=2 * ones, gamma=torch.zeros_like(case.tensors["gamma"])
    )
    _, mirrored = case.call(backend)
    _, back = case.entering(mirrored).call(backend)
    key = case.tensors["k"][:, 0, :, 0]
    householder = torch.eye(4, dtype=key.dtype) - 2 * key.unsqueeze(-1) * key.unsqueeze(-2)
    for name in ("S_k", "S_v"):
        before, after = case.tensors[name][:, :, 0], getattr(mirrored, name)[:, :, 0]
        torch.testing.assert_close(after, torch.einsum("bhij,bhj->bhi", householder, before), rtol=0, atol=tolerance)
        torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=0, atol=tolerance)
        torch.testing.assert_close(getattr(back, name)[:, :, 0], before, rtol=0, atol=tolerance)


@everywhere
def test_a_token_reads_what_it_writes(backend: str) -> None:
    seed_afresh()
    case = random_case(
        length=1, steps=1, writes=1, reads=1, num_slots=1, state=False, surprise=False, dtype=DTYPES[backend]
    )
    ones = torch.ones_like(case.tensors["write_w"])
    case = case.with_tensors(write_w=ones, beta=ones)
    o, _ = case.call(backend)
    # z = a * 1/M + w with M = 1 and the decay of a weight that counts as 0.999.
    z = 0.001 ** case.tensors["gamma"] + 1
    torch.testing.assert_close(
        o[:, 0], case.tensors["u_v"][:, 0, :, 0] / z.unsqueeze(-1), rtol=0, atol=TOLERANCES[backend]
    )


# Time, documents, calls


@exactly
@pytest.mark.parametrize("number", range(10))
def test_the_future_changes_nothing_in_the_past_bitwise(backend: str, number: int) -> None:
    seed_afresh()
    dim, length = int(torch.randint(1, 20, ())), int(torch.randint(2, 40, ()))
    options = {
        "dim": dim,
        "length": length,
        "documents": number % 2 == 0,
        "inject": number % 3 == 0,
        "dtype": torch.float32,
    }
    case, other = random_case(**options), random_case(**options)
    now = int(torch.randint(1, length, ()))
    mixed = {
        name: torch.cat([x[:, :now], other.tensors[name][:, now:]], 1) if x.ndim > 1 and name not in STATE else x
        for name, x in case.tensors.items()
    }
    doc_start = None
    if case.doc_start is not None:
        later = torch.where(random_documents(2, length - now) >= 0, random_documents(2, length - now) + now, -9)
        doc_start = torch.cat([case.doc_start[:, :now], later], 1).cummax(1).values
    o, _ = case.call(backend)
    changed, _ = Case(mixed, case.num_slots, doc_start).call(backend)
    assert torch.equal(o[:, :now], changed[:, :now])
    assert not torch.equal(o[:, now:], changed[:, now:])


@exactly
@pytest.mark.parametrize("inject", [False, True], ids=["", "inject"])
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_two_calls_equal_one(backend: str, documents: bool, inject: bool) -> None:
    """Outputs, leaving state and gradients, wherever the sequence is cut."""
    seed_afresh()
    case = random_case(documents=documents, inject=inject)
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    case = case.with_tensors(**leaves)

    def gradients(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(leaves, torch.autograd.grad(weighted_sum(outputs), list(leaves.values())), strict=True))

    whole = case.outputs(backend)
    for cut in (1, 6, 12):
        first, between = case.span(0, cut).call(backend)
        second, leaving = case.span(cut, 13).entering(between).call(backend)
        in_two = {"o": torch.cat([first, second], 1), **vars(leaving)}
        assert_equal_to(whole, in_two)
        assert_equal_to(gradients(case.outputs(backend)), gradients(in_two))


@exactly
@pytest.mark.parametrize("inject", [False, True], ids=["", "inject"])
def test_packed_documents_equal_the_documents_alone(backend: str, inject: bool) -> None:
    """Documents that began before the call, at its first token, of one token, and up to its last token."""
    seed_afresh()
    rows = [[-4, 5, 6, 11], [0, 12], [-1], [0, 1, 2, 3]]
    doc_start = torch.tensor([[max(s for s in starts if s <= t) for t in range(13)] for starts in rows])
    case = random_case(batch=len(rows), inject=inject)
    o, leaving = Case(case.tensors, case.num_slots, doc_start).call(backend)
    for b, starts in enumerate(rows):
        row = case.row(b)
        for start, stop in zip(starts, [*starts[1:], 13], strict=True):
            document = row.span(max(start, 0), stop)
            if start >= 0:
                document = document.without(*STATE)
            alone = document.outputs(backend)
            assert_equal_to({"o": alone["o"]}, {"o": o[b : b + 1, max(start, 0) : stop]}, 1e-12)
        left = {name: x[b : b + 1] for name, x in vars(leaving).items()}
        assert_equal_to({name: alone[name] for name in STATE}, left, 1e-12)


@everywhere
def test_a_document_at_the_first_token_does_not_see_the_entering_state(backend: str) -> None:
    """Nor does a gradient reach it, whatever it holds."""
    seed_afresh()
    case = random_case(inject=True, dtype=DTYPES[backend])
    doc_start = torch.zeros(2, 13, dtype=torch.long)
    poisoned = case.with_tensors(**{name: torch.full_like(case.tensors[name], torch.nan) for name in STATE})
    want, got = case.without(*STATE), Case(poisoned.tensors, 9, doc_start)
    gradients = got.gradients(backend)
    assert all(not gradients.pop(name).any() for name in STATE)
    for x, y in ((want.outputs(backend), got.outputs(backend)), (want.gradients(backend), gradients)):
        if backend == "triton":  # the kernels are others with an entering memory than without
            assert_equal_to(x, y, 1e-5)
        else:
            assert_bitwise_equal(x, y)


@everywhere
def test_heads_and_rows_do_not_see_each_other(backend: str) -> None:
    seed_afresh()
    case = random_case(batch=3, heads=3, documents=True, inject=True, dtype=torch.float32)
    want = case.outputs(backend)
    of_heads = {name: x for name, x in random_case(batch=3, heads=3, inject=True, dtype=torch.float32).tensors.items()}
    mixed = {}
    for name, x in case.tensors.items():
        mixed[name] = of_heads[name].clone()
        if x.ndim == 1:
            mixed[name][1] = x[1]
        elif name in STATE:
            mixed[name][2, 1] = x[2, 1]
        else:
            mixed[name][2, :, 1] = x[2, :, 1]
    got = Case(mixed, case.num_slots, case.doc_start).outputs(backend)
    assert torch.equal(got.pop("o")[2, :, 1], want.pop("o")[2, :, 1])
    assert all(torch.equal(got[name][2, 1], want[name][2, 1]) for name in want)


@everywhere
def test_slots_that_nothing_touches_may_hold_nan(backend: str) -> None:
    seed_afresh()
    case = random_case(num_slots=60, documents=False, inject=True, dtype=DTYPES[backend])
    idle = ~written_slots(case)
    idle &= ~written_slots(case.with_tensors(write_idx=case.tensors["read_idx"]))
    assert idle.any()
    poisoned = case.with_tensors(
        **{
            name: torch.where(idle.view(*idle.shape, *[1] * (x.ndim - 3)), torch.nan, x)
            for name, x in _state(case).items()
        }
    )
    want, got = case.outputs(backend), poisoned.outputs(backend)
    assert torch.equal(got.pop("o"), want.pop("o"))
    for name in STATE:
        assert got[name][idle].isnan().all() and torch.equal(got[name][~idle], want[name][~idle])
    assert_bitwise_equal(case.gradients(backend), poisoned.gradients(backend))


def _state(case: Case) -> dict[str, Tensor]:
    return {name: case.tensors[name] for name in STATE}


@exactly
def test_initial_state(backend: str) -> None:
    """No entering state is that of section 2's table: zeros, and 1/M in the normaliser."""
    seed_afresh()
    case = random_case(state=False)
    zeros = torch.zeros(2, 2, 9, 4, dtype=torch.float64)
    state = SlotState(zeros, zeros, torch.full((2, 2, 9), 1 / 9, dtype=torch.float64), zeros[..., 0])
    assert_bitwise_equal(case.entering(state).outputs(backend), case.outputs(backend))
    assert_bitwise_equal(vars(state), vars(SlotState.initial(2, 2, 9, 4, dtype=torch.float64)))
    assert SlotState.initial(1, 1, 2, 3).z.dtype == torch.float32
