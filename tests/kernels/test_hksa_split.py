"""Long chains of writes, split into blocks: the same results as the definition, whatever is split where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.hksa_cases import DEVICE, Case
from tests.kernels.hksa_grid import assert_near, choose_stretch, device_case, pairwise, values
from tests.seeds import seed_afresh

CASES = pairwise(
    {
        "steps": (2, 1, 3, 4),
        "documents": (False, True),
        "state": (True, False),
        "surprise": (False, True),
        "stretch": (None, 21),
        "dim": (32, 48),
        "num_slots": (3, 5),
        "capacity": (64, 5),  # blocks of a stream; with the smaller one not all long chains can be split
    }
)


def split_all(monkeypatch: pytest.MonkeyPatch, case: Case, capacity: int) -> None:
    """Splits chains of more than three writes, as far as there are blocks."""
    from slotmamba_kernels.hksa import split

    monkeypatch.setattr(split, "LEAST_WRITES", 3)
    monkeypatch.setattr(split, "FULL_GPU", 2**30)
    batch, _, heads, _ = case.tensors["q"].shape
    monkeypatch.setattr(split, "BLOCKS_IN_ALL", capacity * batch * heads)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_split_chains_equal_the_definition(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_afresh()
    options: dict[str, Any] = dict(CASES[number])
    stretch, capacity = options.pop("stretch"), options.pop("capacity")
    case = device_case(**options, batch=1, heads=1, length=41 if options["steps"] < 3 else 27, writes=2, reads=2)
    split_all(monkeypatch, case, capacity)
    assert_near(case, values(case, "triton", **choose_stretch(case, stretch, monkeypatch))[0])


def test_hot_slots_are_split_and_the_rest_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks cover each long bucket's writes once and in order; a short one has none."""
    from slotmamba_kernels.hksa import launch
    from slotmamba_kernels.hksa.split import Split, split_long_chains

    seed_afresh()
    case = device_case(batch=1, heads=2, length=20, writes=2, reads=1, num_slots=40, dim=32, steps=4, state=False)
    hot = case.tensors["write_idx"].clone()
    hot[..., 0], hot[..., 1] = 39, hot[..., 1] % 39
    case = case.with_tensors(write_idx=hot)
    split_all(monkeypatch, case, 64)
    seen: list[tuple[Split, Any]] = []

    def record(x: Any, at: Any, log_keep: Any) -> Split | None:
        found = split_long_chains(x, at, log_keep)
        assert found is not None
        seen.append((found, at.plan))
        return found

    monkeypatch.setattr(launch, "split_long_chains", record)
    assert_near(case, values(case, "triton")[0])
    split, plan = seen[0]
    for begins, ranges, bucket in zip(split.block_begin, split.block_range, plan.write_bucket, strict=True):
        counts = bucket.diff()
        assert torch.equal(begins.diff() > 0, counts > 3)
        for i in range(len(counts)):
            blocks = ranges[begins[i] : begins[i + 1]]
            writes = [p for first, last in blocks.tolist() for p in range(first, last)]
            assert writes == (list(range(bucket[i], bucket[i + 1])) if counts[i] > 3 else [])
            assert all(last - first <= 8 for first, last in blocks.tolist())


def test_two_runs_are_bitwise_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_afresh()
    case = device_case(batch=1, heads=1, length=24, writes=2, num_slots=3, dim=32, documents=True)
    split_all(monkeypatch, case, 64)
    first, second = (values(case, "triton")[0] for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA: too large for the interpreter")
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16], ids=str)
def test_skew_at_length(activations: torch.dtype) -> None:
    """Zipf-distributed addresses at the size at which splitting begins by itself."""
    seed_afresh()
    case = device_case(
        activations, batch=1, heads=8, length=4096, dim=128, writes=8, reads=8, num_slots=256, extremes=False
    )  # fmt: skip
    zipf = 1 / torch.arange(1, 257, device=DEVICE, dtype=torch.float32)
    slots = torch.multinomial(zipf.expand(8 * 4096, -1), 8).view(1, 4096, 8, 8).int()
    case = case.with_tensors(write_idx=slots)
    assert_near(case, values(case, "triton")[0], "torch")
