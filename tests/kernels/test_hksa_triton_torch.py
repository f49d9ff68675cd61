"""HKSA's Triton ops within what torch does with ops: opcheck, autocast, checkpointing, compilation, sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from slotmamba_kernels.hksa import triton_op
from tests.kernels.hksa_cases import DEVICE, Case, assert_equal_to, weighted_sum
from tests.kernels.hksa_grid import choose_stretch, dense_outputs, device_case, values
from tests.seeds import seed_afresh

SMALL: dict[str, Any] = {"batch": 1, "heads": 1, "length": 3, "dim": 32, "steps": 1, "writes": 2}

CALLS: dict[str, dict[str, Any]] = {
    "nothing optional": {"state": False, "surprise": False},
    "everything": {"documents": True, "inject": True, "activations": torch.bfloat16},
    "sparse, in stretches": {"state": False, "num_slots": 5000, "stretch": 2, "inject": True},
    "without what leaves": {"stretch": 2, "return_state": False},
}


def op_arguments(case: Case, recompute: bool, return_state: bool) -> list[Any]:
    """Of `hksa_forward`."""
    rest = {"doc_start": case.doc_start, "num_slots": case.num_slots, "recompute": recompute}
    named = {**case.tensors, **rest, "return_state": return_state}
    return [named.get(name) for name in triton_op.ARGUMENTS]


@pytest.mark.parametrize("options", list(CALLS.values()), ids=list(CALLS))
def test_opcheck(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, many_chains: None) -> None:
    """Schemas, registrations, fake kernels against real ones, and tracing forward and backward."""
    seed_afresh()
    options = dict(options)
    stretch, return_state = options.pop("stretch", None), options.pop("return_state", True)
    case = device_case(**SMALL | options)
    recompute = choose_stretch(case, stretch, monkeypatch)["recompute"]
    arguments = op_arguments(case, recompute, return_state)
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    torch.library.opcheck(triton_op.hksa_forward, tuple(leaves))

    with torch.no_grad():
        o, *left, left_slots = (saved := triton_op.hksa_forward(*arguments))[:6]
    named = dict(zip(triton_op.ARGUMENTS, arguments, strict=True))
    given = [None if named[name] is None else named[name].detach() for name in triton_op.DIFFERENTIABLE]
    d_left = [torch.randn_like(x) if return_state else None for x in left]
    backward = (
        torch.randn_like(o), *d_left, left_slots, saved[6:], *given, None, case.doc_start, case.num_slots, recompute
    )  # fmt: skip
    torch.library.opcheck(triton_op.hksa_backward, backward)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(autocast: torch.dtype, many_chains: None) -> None:
    """Inputs are taken as given, whatever their types, and the output has q's."""
    seed_afresh()
    for activations in (torch.float32, torch.bfloat16):
        case = device_case(activations, **SMALL, documents=True, inject=True)
        want = values(case, "triton")[0]
        with torch.autocast(DEVICE, autocast):
            assert (torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2, device=DEVICE)).dtype == autocast
            got = values(case, "triton")[0]
        assert got["o"].dtype == activations
        assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("stretch", [None, 2])
def test_activation_checkpointing(stretch: int | None, monkeypatch: pytest.MonkeyPatch, many_chains: None) -> None:
    seed_afresh()
    case = device_case(**SMALL, documents=True, inject=True)
    options = choose_stretch(case, stretch, monkeypatch)
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}

    def run(**tensors: Tensor) -> dict[str, Tensor]:
        return dense_outputs(case.with_tensors(**tensors), "triton", **options)

    outputs = checkpoint(run, **leaves, use_reentrant=False)
    found = torch.autograd.grad(weighted_sum(outputs), list(leaves.values()))
    want = values(case, "triton", **options)[0]
    assert all(torch.equal(x, want[name]) for name, x in outputs.items())
    assert all(torch.equal(x, want[f"d_{name}"]) for name, x in zip(leaves, found, strict=True))


@pytest.mark.parametrize(
    ("call", "dynamic"),
    [("nothing optional", False), ("everything", False), ("everything", True), ("sparse, in stretches", True)],
)
def test_compilation_of_the_whole_graph(
    call: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch, many_chains: None
) -> None:
    """On a GPU by the default compiler, else traced only; then again for a longer sequence."""
    seed_afresh()
    torch.compiler.reset()
    options = dict(CALLS[call])
    stretch = options.pop("stretch", None)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    def run(tensors: dict[str, Tensor], doc_start: Tensor | None, recompute: bool) -> dict[str, Tensor]:
        doubled = {name: 2 * x if name == "q" else x for name, x in tensors.items()}
        return dense_outputs(Case(doubled, num_slots, doc_start), "triton", recompute=recompute)

    for length in (3, 5):
        case = device_case(**SMALL | options | {"length": length})
        num_slots = case.num_slots
        recompute = choose_stretch(case, stretch, monkeypatch)["recompute"]
        halved = case.with_tensors(q=case.tensors["q"] / 2)
        leaves = {name: x.requires_grad_() for name, x in halved.tensors.items() if x.is_floating_point()}
        outputs = run(halved.tensors, case.doc_start, recompute)
        found = torch.autograd.grad(weighted_sum(outputs), list(leaves.values()))
        want = values(case, "triton", recompute=recompute)[0]
        got = outputs | {f"d_{name}": x / 2 if name == "q" else x for name, x in zip(leaves, found, strict=True)}
        assert_equal_to(want, got, 1e-5)


class Layer(nn.Module):
    """HKSA of fixed addresses on projections of the input, with parameters that reach it as they are."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        dim = case.tensors["q"].shape[-1]
        self.project = nn.Linear(dim, dim)
        self.gamma = nn.Parameter(torch.rand(case.tensors["q"].shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x)
        return self.case.with_tensors(
            q=q, u_v=q.unsqueeze(3).expand_as(self.case.tensors["u_v"]), gamma=self.gamma
        ).call("triton", recompute=True)[0]


def _sharded(rank: int, size: int, folder: str) -> None:
    """Each process has other data; the sharded gradients are the mean of those that the whole module has on each."""
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    torch.manual_seed(7)
    case = device_case(**SMALL | {"steps": 2})
    model = nn.Sequential(Layer(case), Layer(case)).to(DEVICE)
    data = torch.randn(size, *case.tensors["q"].shape, device=DEVICE)
    want = [torch.zeros_like(p) for p in model.parameters()]
    for x in data:
        gradients = torch.autograd.grad(weighted_sum({"o": model(x)}) / size, list(model.parameters()))
        want = [total + gradient for total, gradient in zip(want, gradients, strict=True)]

    mesh = init_device_mesh(DEVICE, (size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    weighted_sum({"o": model(data[rank])}).backward()
    for (name, p), expected in zip(model.named_parameters(), want, strict=True):
        assert isinstance(p.grad, DTensor), name
        torch.testing.assert_close(p.grad.full_tensor(), expected, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()


def test_sharded_parameters(tmp_path: Path) -> None:
    """FSDP2, by two processes; on a GPU by one."""
    seed_afresh()
    size = 1 if DEVICE == "cuda" else 2
    spawn(_sharded, (size, str(tmp_path)), nprocs=size)
