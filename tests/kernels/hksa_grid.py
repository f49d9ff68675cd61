"""Cases of HKSA that cover every pair of features, and comparing a backend with the definition in float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.hksa_cases import DEVICE, Case, random_case, weighted_sum

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}

# What a model in half precision hands over in half precision: everything but addresses, decay and states.
ACTIVATIONS = ("q", "k", "u_k", "u_v", "beta", "c_k", "c_v", "lam_k", "lam_v")


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Choices of one value for each axis in which every two values of two axes come together at least once.

    The same list every time. Greedy: each choice begins with a pair that is missing and takes, axis by axis, the value
    that makes up most missing pairs, any of them where several do.
    """
    rng = random.Random(0)
    items = {name: [(name, i) for i in range(len(values))] for name, values in axes.items()}
    missing = {
        frozenset(pair) for a, b in itertools.combinations(items.values(), 2) for pair in itertools.product(a, b)
    }
    rows = []
    while missing:
        row = dict(min(map(sorted, missing)))
        for name in rng.sample(list(axes), len(axes)):
            if name not in row:
                made_up = {item: sum(frozenset((item, x)) in missing for x in row.items()) for item in items[name]}
                row[name] = rng.choice([i for (_, i), count in made_up.items() if count == max(made_up.values())])
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: values[row[name]] for name, values in axes.items()})
    return rows


def device_case(activations: torch.dtype = torch.float32, **options: Any) -> Case:
    """A random case in float32 on DEVICE, its activations of another type."""
    case = random_case(dtype=torch.float32, **options)
    rounded = {name: x.to(activations) for name, x in case.tensors.items() if name in ACTIVATIONS}
    return to_device(case.with_tensors(**rounded))


def to_device(case: Case) -> Case:
    doc_start = None if case.doc_start is None else case.doc_start.to(DEVICE)
    return replace(case.with_tensors(**{name: x.to(DEVICE) for name, x in case.tensors.items()}), doc_start=doc_start)


def choose_stretch(case: Case, tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Arguments of hksa for stretches of this many tokens."""
    from slotmamba_kernels.hksa import triton_op

    if tokens is None:
        return {"recompute": False}
    batch, _, heads, dim = case.tensors["q"].shape
    token = batch * heads * case.tensors["write_w"].shape[-1] * 2 * dim * case.tensors["q"].element_size()
    monkeypatch.setattr(triton_op, "RECOMPUTED_BYTES", tokens * token)
    return {"recompute": True}


def dense_outputs(case: Case, backend: str, **options: Any) -> dict[str, Tensor]:
    """Outputs by name as `Case.outputs` has them, the leaving memory with a row for each slot."""
    o, state = case.call(backend, **options)
    state = state.dense()
    # Not by vars(), which torch.compile of torch 2.11 does not follow.
    return {"o": o, "S_k": state.S_k, "S_v": state.S_v, "z": state.z, "surprise": state.surprise}


def values(case: Case, backend: str, seeds: Sequence[int] = (5,), **options: Any) -> list[dict[str, Tensor]]:
    """Outputs by name and gradients by "d_" and the name, for each seed those of another combination of the outputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    outputs = dense_outputs(case.with_tensors(**leaves), backend, **options)
    results = []
    for seed in seeds:
        gradients = torch.autograd.grad(
            weighted_sum(outputs, seed), list(leaves.values()), retain_graph=len(seeds) > 1, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        named = {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}
        results.append({name: x.detach() for name, x in (outputs | named).items()})
    return results


def assert_near(case: Case, got: dict[str, Tensor], definition: str = "reference") -> None:
    """`values` against those of a backend in float64 on the same inputs, relative to each tensor's norm.

    A gradient that happens to cancel out is held against what it is for other combinations of the outputs, and what is
    small throughout against entries of size 1. The read weights' is that of their logarithms, which alone matter:
    dividing by a weight of 1e-30 would leave nothing else of the norm.
    """
    want, *others = values(case.double(), definition, seeds=(5, 6, 7, 8))
    tolerance = TOLERANCES[case.tensors["q"].dtype]
    assert got.keys() == want.keys()
    for name, x in got.items():
        dtype = (
            case.tensors["q" if name == "o" else name[2:]].dtype if name == "o" or name[:2] == "d_" else torch.float32
        )
        assert x.dtype == dtype and x.shape == want[name].shape, name
        scale = case.tensors["read_w"].double().clamp(min=1e-30) if name == "d_read_w" else 1.0
        norm = max(float((scale * result[name]).norm()) for result in (want, *others))
        error = float((scale * (x.double() - want[name])).norm())
        assert error <= tolerance * max(norm, x.numel() ** 0.5), f"{name}: off by {error:.2e}, norm {norm:.2e}"
