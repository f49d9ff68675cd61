"""Random inputs of HKSA, and running them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmamba_kernels import SlotState, hksa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

STATE = ("S_k", "S_v", "z", "surprise")
SURPRISE = ("a_s", "eta")
INJECT = ("c_k", "c_v", "lam_k", "lam_v")

# No weight, the smallest that float32 has, either side of 0.999 (where the decay stops following w), and all.
WRITE_WEIGHTS = (0.0, 1e-38, 1e-7, 0.998999, 0.999, 0.999001, 1.0)
READ_WEIGHTS = (0.0, 1e-38, 1e-30, 1.0)


@dataclass(frozen=True)
class Case:
    """A call of hksa, its tensors by name: those of the signature, of STATE, of SURPRISE and of INJECT."""

    tensors: dict[str, Tensor]
    num_slots: int
    doc_start: Tensor | None = None

    def with_tensors(self, **tensors: Tensor) -> Case:
        return replace(self, tensors={**self.tensors, **tensors})

    def without(self, *names: str) -> Case:
        return replace(self, tensors={name: x for name, x in self.tensors.items() if name not in names})

    def double(self) -> Case:
        """The call with every floating-point tensor in float64."""
        return self.with_tensors(**{name: x.double() for name, x in self.tensors.items() if x.is_floating_point()})

    def span(self, start: int, stop: int) -> Case:
        """The call on these tokens only, the entering state as it is."""
        per_token = {name for name in self.tensors if name not in (*STATE, *SURPRISE, "gamma")}
        tensors = {name: x[:, start:stop] if name in per_token else x for name, x in self.tensors.items()}
        doc_start = None if self.doc_start is None else self.doc_start[:, start:stop] - start
        return Case(tensors, self.num_slots, doc_start)

    def row(self, b: int) -> Case:
        """The call on one row of the batch."""
        shared = (*SURPRISE, "gamma")
        tensors = {name: x if name in shared else x[b : b + 1] for name, x in self.tensors.items()}
        return Case(tensors, self.num_slots, None if self.doc_start is None else self.doc_start[b : b + 1])

    def entering(self, state: SlotState) -> Case:
        return self.with_tensors(**vars(state))

    @property
    def state(self) -> SlotState | None:
        return SlotState(*(self.tensors[name] for name in STATE)) if "z" in self.tensors else None

    def call(self, backend: str = "torch", **options: Any) -> tuple[Tensor, SlotState]:
        """options: further keyword arguments of hksa. Triton runs on a GPU where there is one, wherever the case is."""
        home = self.tensors["q"].device
        device = DEVICE if backend == "triton" else home
        tensors: dict[str, Any] = {name: x.to(device) for name, x in self.tensors.items()}
        doc_start = None if self.doc_start is None else self.doc_start.to(device)
        for names in (STATE, SURPRISE, INJECT):
            group = tuple(tensors.pop(name) for name in names if name in tensors)
            if group:
                tensors["state" if names is STATE else "surprise" if names is SURPRISE else "inject"] = group
        if "state" in tensors:
            tensors["state"] = SlotState(*tensors["state"])
        o, state = hksa(**tensors, num_slots=self.num_slots, doc_start=doc_start, backend=backend, **options)
        assert state is not None
        return o.to(home), state.map(lambda x: x.to(home))

    def outputs(self, backend: str = "torch") -> dict[str, Tensor]:
        o, state = self.call(backend)
        return {"o": o, **vars(state)}

    def gradients(self, backend: str = "torch") -> dict[str, Tensor]:
        """Of a fixed random combination of all outputs, with respect to every floating-point tensor of the call."""
        leaves = {
            name: x.detach().clone().requires_grad_() for name, x in self.tensors.items() if x.is_floating_point()
        }
        loss = weighted_sum(self.with_tensors(**leaves).outputs(backend))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))


def weighted_sum(outputs: dict[str, Tensor], seed: int = 5) -> Tensor:
    """A number that depends on every entry of the outputs: their product with random weights fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    terms = [
        (x.double() * torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device)).sum()
        for x in outputs.values()
    ]
    return torch.stack(terms).sum()


def random_case(
    *,
    batch: int = 2,
    length: int = 13,
    heads: int = 2,
    steps: int = 2,
    dim: int = 4,
    writes: int = 3,
    reads: int = 2,
    num_slots: int = 9,
    documents: bool = False,
    state: bool = True,
    surprise: bool = True,
    inject: bool = False,
    extremes: bool = True,
    same_slots: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """extremes: some weights and step sizes at the ends of their ranges; same_slots: one set of slots for all."""
    per_token = (batch, length, heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=dtype)

    def slots(count: int) -> Tensor:
        scores = torch.rand(batch, 1, heads, num_slots) if same_slots else torch.rand(*per_token, num_slots)
        return scores.topk(count, -1).indices.expand(*per_token, count).to(torch.int32)

    tensors = {
        "q": normal(*per_token, dim),
        "k": F.normalize(normal(*per_token, steps, dim), dim=-1),
        "u_k": normal(*per_token, steps, dim),
        "u_v": normal(*per_token, steps, dim),
        "beta": 2 * uniform(*per_token, steps),
        "write_idx": slots(writes),
        "write_w": uniform(*per_token, writes),
        "read_idx": slots(reads),
        "read_w": uniform(*per_token, reads),
        "gamma": 2 * uniform(heads),
    }
    if extremes:
        # float32's nearest number to 0.999 lies above it, so in float64 it is on the other side.
        weights = WRITE_WEIGHTS if dtype == torch.float64 else tuple(w for w in WRITE_WEIGHTS if w != 0.999)
        _scatter_some(tensors["write_w"], weights)
        _scatter_some(tensors["read_w"], READ_WEIGHTS)
        _scatter_some(tensors["beta"], (0.0, 2.0))
    if state:
        memory = (batch, heads, num_slots)
        contents = (normal(*memory, dim), normal(*memory, dim), uniform(*memory) + 0.1, uniform(*memory))
        tensors.update(zip(STATE, contents, strict=True))
    if surprise:
        tensors.update(a_s=uniform(heads), eta=uniform(heads))
    if inject:
        active = (*per_token, writes)
        contents = (normal(*active, dim), normal(*active, dim), uniform(*active), uniform(*active))
        tensors.update(zip(INJECT, contents, strict=True))
    return Case(tensors, num_slots, random_documents(batch, length) if documents else None)


def random_documents(batch: int, length: int) -> Tensor:
    """doc_start [B, T]: half of the rows go on with a document that began before, the others start one at token 0."""
    index = torch.arange(length)
    starts = torch.rand(batch, length) < 0.25
    starts[:, 0] = torch.rand(batch) < 0.5
    began_before = -1 - int(torch.randint(5, ()))
    return torch.where(starts, index, began_before).cummax(1).values


def _scatter_some(x: Tensor, values: tuple[float, ...]) -> None:
    """Overwrites a third of the entries with values drawn from these."""
    drawn = torch.tensor(values, dtype=x.dtype)[torch.randint(len(values), x.shape)]
    x.copy_(torch.where(torch.rand(x.shape) < 1 / 3, drawn, x))


def assert_equal_to(
    want: dict[str, Tensor], got: dict[str, Tensor], tolerance: float = 1e-10, least: float = 1e-6
) -> None:
    """Every tensor to `tolerance` times the largest magnitude in the wanted one, or times `least` if that is less."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype and got[name].shape == expected.shape, name
        scale = max(least, float(expected.detach().abs().max()))
        difference = float((got[name] - expected).detach().abs().max())
        assert difference <= tolerance * scale, f"{name}: off by {difference:.2e}, largest entry {scale:.2e}"
