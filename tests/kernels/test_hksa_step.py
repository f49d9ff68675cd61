"""The decoding step in place, against the definition with T = 1 in float64, one token after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba_kernels import SlotState, hksa, hksa_step_, kronecker_topk
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.seeds import seed_afresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 40 if DEVICE == "cuda" else 4
BATCH, HEADS = (5, 3) if DEVICE == "cuda" else (1, 2)


@dataclass(frozen=True)
class Token:
    """A token's arguments of `hksa_step_`, [B, H, ...]."""

    q: Tensor
    k: Tensor
    u_k: Tensor
    u_v: Tensor
    beta: Tensor
    write_logits: Tensor
    read_logits: Tensor

    def to(self, dtype: torch.dtype) -> Token:
        return Token(*(x.to(dtype) for x in vars(self).values()))


@dataclass(frozen=True)
class Case:
    """Tokens, a state and what is the same for all tokens; `shared` are the further arguments."""

    tokens: list[Token]
    state: SlotState
    shared: dict[str, Any]

    def run(self, backend: str) -> tuple[Tensor, SlotState]:
        """Outputs [tokens, B, H, d] and the state, starting from a copy."""
        state = self.state.map(torch.clone)
        o = [hksa_step_(**vars(token), state=state, **self.shared, backend=backend) for token in self.tokens]
        return torch.stack(o), state

    def double(self) -> Case:
        surprise = self.shared["surprise"]
        shared = {
            **self.shared,
            "gamma": self.shared["gamma"].double(),
            "surprise": None if surprise is None else tuple(x.double() for x in surprise),
        }
        return Case([token.to(torch.float64) for token in self.tokens], self.state.map(Tensor.double), shared)

    def definition(self) -> tuple[Tensor, SlotState]:
        """What `run` should give, by kronecker_topk and hksa in float64."""
        case, outputs = self.double(), []
        state, top_k = case.state, case.shared["top_k"]
        for token in case.tokens:
            arguments = {name: x.unsqueeze(1) for name, x in vars(token).items()}
            write, read = (
                kronecker_topk(arguments.pop(f"{name}_logits"), top_k, "torch") for name in ("write", "read")
            )
            o, after = hksa(
                **arguments, write_idx=write[0], write_w=write[1], read_idx=read[0], read_w=read[1],
                gamma=case.shared["gamma"], surprise=case.shared["surprise"],
                num_slots=state.z.shape[-1], state=state, backend="reference",
            )  # fmt: skip
            assert after is not None
            state = after
            outputs.append(o.squeeze(1))
        return torch.stack(outputs), state


def random_case(
    *,
    dim: int = 32,
    steps: int = 2,
    factors: int = 3,
    size: int = 4,
    top_k: int = 8,
    surprise: bool = True,
    addresses: str = "overlapping",
    dtype: torch.dtype = torch.float32,
    count: int = TOKENS,
    batch: int = BATCH,
    heads: int = HEADS,
) -> Case:
    """Logits are multiples of 1/16: sums are exact in float32 then, and slots the same as in float64, ties included."""
    slots = (batch, heads, size**factors)

    def logits() -> Tensor:
        return (32 * torch.randn(batch, heads, factors, size)).round() / 16

    def token() -> Token:
        write, read = logits(), logits()
        if addresses == "overlapping":
            read = torch.where(torch.rand(batch, heads, 1, 1) < 0.5, write, (write + read / 4).mul(16).round() / 16)
        return Token(
            q=torch.randn(batch, heads, dim).to(dtype),
            k=F.normalize(torch.randn(batch, heads, steps, dim), dim=-1).to(dtype),
            u_k=torch.randn(batch, heads, steps, dim).to(dtype),
            u_v=torch.randn(batch, heads, steps, dim).to(dtype),
            beta=(2 * torch.rand(batch, heads, steps)).to(dtype),
            write_logits=write,
            read_logits=read,
        )

    def here(token: Token) -> Token:
        return Token(*(x.to(DEVICE) for x in vars(token).values()))

    contents = (torch.randn(*slots, dim), torch.randn(*slots, dim), torch.rand(slots) + 0.5, torch.rand(slots))
    shared = {
        "gamma": (2 * torch.rand(heads)).to(DEVICE),
        "top_k": top_k,
        "surprise": (torch.rand(heads).to(DEVICE), torch.rand(heads).to(DEVICE)) if surprise else None,
    }
    return Case([here(token()) for _ in range(count)], SlotState(*contents).map(lambda x: x.to(DEVICE)), shared)


def assert_close(got: tuple[Tensor, SlotState], want: tuple[Tensor, SlotState], o_tolerance: float = 1e-5) -> None:
    """The output to its tolerance times its largest number, the state to 1e-5."""
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=o_tolerance * float(want[0].abs().max()))
    for name, expected in vars(want[1]).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(getattr(got[1], name).double(), expected, rtol=0, atol=1e-5 * scale, msg=name)


SHAPES: dict[str, dict[str, Any]] = {
    "reference": {"dim": 128, "factors": 5, "count": 2},
    "bfloat16": {"dim": 64, "dtype": torch.bfloat16},
    "float16": {"dim": 64, "dtype": torch.float16},
    "one step": {"steps": 1},
    "three steps": {"steps": 3},
    "four steps, wide": {"steps": 4, "dim": 256, "top_k": 3},
    "odd sizes": {"dim": 100, "factors": 2, "size": 5, "top_k": 7},
    "narrow": {"dim": 5},
    "one slot a token": {"top_k": 1},
    "all slots": {"factors": 2, "size": 3, "top_k": 9},
    "one slot in all": {"factors": 1, "size": 1, "top_k": 1},
    "many slots": {"factors": 10, "size": 2, "top_k": 16, "count": 2},
    "most slots a token": {"factors": 5, "size": 2, "top_k": 32, "count": 2},
    "large factors": {"factors": 2, "size": 50, "top_k": 8, "count": 2},
    "flat": {"factors": 1, "size": 1024, "count": 2},
    "no surprise": {"surprise": False},
    "independent addresses": {"addresses": "independent"},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_one_kernel_equals_the_definition(options: dict[str, Any]) -> None:
    seed_afresh()
    case = random_case(**options)
    dtype = options.get("dtype", torch.float32)
    got = case.run("triton")
    assert got[0].dtype == dtype and got[1].z.dtype == torch.float32
    assert_close(got, case.definition(), {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype])
    if not options.get("surprise", True):
        assert torch.equal(got[1].surprise, case.state.surprise)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_torch_equals_the_definition(options: dict[str, Any]) -> None:
    """In float64; also where a slot is written and read, and where it is only one of the two."""
    seed_afresh()
    case = random_case(**options, batch=2, heads=2).double()
    got, want = case.run("torch"), case.definition()
    for a, b in zip((got[0], *vars(got[1]).values()), (want[0], *vars(want[1]).values()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_written_slots_change(backend: str) -> None:
    seed_afresh()
    case = random_case(count=1, batch=2, dim=33, factors=2, size=10, addresses="independent")
    _, state = case.run(backend)
    written = torch.zeros_like(state.z, dtype=torch.bool)
    indices, _ = kronecker_topk(case.tokens[0].write_logits, case.shared["top_k"], "torch")
    written.scatter_(2, indices.long(), True)
    for before, after in zip(vars(case.state).values(), vars(state).values(), strict=True):
        changed = (before != after).flatten(3).any(-1) if before.ndim == 4 else before != after
        assert torch.equal(changed, written)


@pytest.mark.parametrize("options", [{}, {"dim": 128, "top_k": 5}, {"dim": 256, "steps": 1}], ids=str)
def test_two_runs_are_equal_bit_by_bit_and_touch_their_own_numbers_only(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state amid numbers that must stay, an output full of NaN."""
    seed_afresh()
    case = random_case(**options, count=2)
    want = case.run("triton")
    guard = 1024

    def amid(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 2 * guard,), 7.0, device=DEVICE)
        buffers.append(buffer)
        return buffer[guard:-guard].view_as(x).copy_(x)

    buffers: list[Tensor] = []
    state = case.state.map(amid)
    # The inputs too: what lies around them must not reach the output.
    shared = {**case.shared, "gamma": amid(case.shared["gamma"])}
    outputs = []
    for token in case.tokens:
        arguments = {name: amid(x) for name, x in vars(token).items()}
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda x: amid(torch.full(x.shape, float("nan"))))
            outputs.append(hksa_step_(**arguments, state=state, **shared, backend="triton"))
    assert torch.equal(torch.stack(outputs), want[0])
    assert all(torch.equal(a, b) for a, b in zip(vars(state).values(), vars(want[1]).values(), strict=True))
    assert all((buffer[:guard] == 7).all() and (buffer[-guard:] == 7).all() for buffer in buffers)


def test_reads_see_what_other_warps_have_just_written() -> None:
    """Memories of few slots, so that every read finds a write of its token, many programs at once."""
    seed_afresh()
    many = {"batch": 64, "heads": 8, "count": 30} if DEVICE == "cuda" else {}
    case = random_case(dim=256, factors=2, size=4, top_k=16, surprise=False, addresses="independent", **many)
    assert_close(case.run("triton"), case.definition())


def test_torch_library_sees_the_op() -> None:
    from slotmamba_kernels.hksa.decode_fused import hksa_step_fused

    seed_afresh()
    case = random_case(factors=2, count=1)
    for surprise in ((None, None), case.shared["surprise"]):
        arguments = (*vars(case.tokens[0]).values(), case.shared["gamma"], *surprise)
        torch.library.opcheck(hksa_step_fused, (*arguments, *vars(case.state.map(torch.clone)).values(), 4))


def test_compiles_into_one_graph() -> None:
    seed_afresh()
    case = random_case(factors=2, count=1)

    def step(token: dict[str, Tensor], state: SlotState) -> Tensor:
        return 2 * hksa_step_(**token, state=state, **case.shared, backend="triton")

    want, state = case.run("triton")
    compiled_state = case.state.map(torch.clone)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(vars(case.tokens[0]), compiled_state)
    assert torch.equal(got, 2 * want[0])
    assert all(torch.equal(a, b) for a, b in zip(vars(compiled_state).values(), vars(state).values(), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_does_not_reach_inside(backend: str) -> None:
    seed_afresh()
    case = random_case(factors=2, count=2)
    want = case.run(backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = case.run(backend)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1].S_v, want[1].S_v)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_replays_in_a_cuda_graph() -> None:
    """Captured on one token, replayed on the others by copying them into its inputs."""
    seed_afresh()
    case = random_case(dim=128, factors=5)
    want, want_state = case.run("triton")
    state = case.state.map(torch.clone)
    token = Token(*(x.clone() for x in vars(case.tokens[0]).values()))

    def step() -> Tensor:
        return hksa_step_(**vars(token), state=state, **case.shared, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    for memory, fresh in zip(vars(state).values(), vars(case.state).values(), strict=True):
        memory.copy_(fresh)
    outputs = []
    for following in case.tokens:
        for target, source in zip(vars(token).values(), vars(following).values(), strict=True):
            target.copy_(source)
        graph.replay()
        outputs.append(o.clone())
    assert torch.equal(torch.stack(outputs), want)
    assert all(torch.equal(a, b) for a, b in zip(vars(state).values(), vars(want_state).values(), strict=True))


def test_wrong_arguments_are_refused() -> None:
    case = random_case(count=1)
    token, state, shared = case.tokens[0], case.state, case.shared

    def refused(message: str, token: Token = token, state: SlotState = state, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            hksa_step_(**vars(token), state=state, **{**shared, **changes})

    refused(r"expected \[B, H, d\], \[B, H, n, d\] and", replace(token, q=token.q.unsqueeze(1)))
    refused("beta has shape", replace(token, beta=token.beta[..., :1]))
    refused("read_logits has shape", replace(token, read_logits=token.read_logits[..., :1]))
    refused("state.z has shape", state=replace(state, z=state.z[..., :5]))
    refused("top_k=65 is not between 1 and the 64 slots", top_k=65)
    refused("surprise eta has shape", surprise=(shared["gamma"], torch.zeros(9)))
    refused("state.S_k is torch.float64", state=replace(state, S_k=state.S_k.double()))
    refused("overwritten in place", state=replace(state, S_v=state.S_v.transpose(2, 3).contiguous().transpose(2, 3)))
    refused("unknown backend 'reference'", backend="reference")
    refused("backend 'triton' takes n <= 4", top_k=33, backend="triton")


def _calls() -> dict[str, Any]:
    options = [
        {"dim": 128, "factors": 5, "dtype": torch.bfloat16},
        {"dim": 200, "steps": 4, "factors": 2, "size": 50, "top_k": 20, "surprise": False},
        {"dim": 32, "factors": 1, "size": 4096, "top_k": 32},
    ]
    return {str(chosen): lambda chosen=chosen: random_case(**chosen, count=1).run("triton") for chosen in options}


CALLS = _calls()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_ahead_of_time(architecture: int) -> None:
    assert compile_in_subprocess(architecture, "tests.kernels.test_hksa_step:CALLS") == ["step_kernel"]
