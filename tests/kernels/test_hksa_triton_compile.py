"""Every kernel of HKSA compiles for every GPU that is meant: each value of each switch and size in some call."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from slotmamba_kernels.hksa import launch
from tests.kernels.ahead_of_time import ARCHITECTURES, compile_in_subprocess
from tests.kernels.hksa_grid import choose_stretch, device_case

KERNELS = [
    "carry_blocks", "chain_backward", "chain_forward", "choose_blocks", "entering_backward", "link_kernel",
    "map_blocks", "rank_kernel", "read_backward",
    "read_forward", "scan_kernel", "scatter_kernel", "surprise_backward", "surprise_forward", "token_backward",
    "write_log_keeps",
]  # fmt: skip


def call(many_chains: bool, activations: torch.dtype, stretch: int | None = None, **options: Any) -> None:
    """Forward and backward; with many chains no writes are loaded ahead."""
    torch.manual_seed(0)
    case = device_case(activations, **{"batch": 1, "length": 5, "num_slots": 64, **options})
    leaves = {name: x.requires_grad_() for name, x in case.tensors.items() if x.is_floating_point()}
    with pytest.MonkeyPatch.context() as patch:
        if many_chains:
            patch.setattr(launch, "FEWEST_PROGRAMS", 1)
        o, state = case.call("triton", **choose_stretch(case, stretch, patch))
        loss = o.sum() + state.S_k.sum() + state.S_v.sum() + state.z.sum() + state.surprise.sum()
        torch.autograd.grad(loss, list(leaves.values()))


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
MODEL: dict[str, Any] = {"dim": 128, "steps": 2, "writes": 8, "reads": 8, "state": False}
CALLS = {
    "in a model": partial(call, False, BRAIN, surprise=False, length=64, **MODEL),
    "in a long sequence": partial(call, True, BRAIN, stretch=3, num_slots=5000, **MODEL),
    "least": partial(call, True, SINGLE, dim=32, steps=1, writes=1, reads=1),
    "most": partial(call, False, HALF, dim=256, steps=4, writes=32, reads=32, documents=True, inject=True),
    "long chains": partial(call, True, SINGLE, dim=256, steps=4, writes=32, reads=32, documents=True, length=64),
    "odd": partial(call, True, SINGLE, dim=96, steps=3, writes=5, reads=7, inject=True, surprise=False),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_ahead_of_time(architecture: int) -> None:
    assert compile_in_subprocess(architecture, "tests.kernels.test_hksa_triton_compile:CALLS") == KERNELS
