"""Which implementation of an op runs: asked for by name, or picked for the device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import torch
from torch import Tensor

CHECKED_GPUS = frozenset({(9, 0)})
"""Compute capabilities on which the full test grid of the Triton kernels has passed: `auto` picks them there."""

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(op: str, backend: str, x: Tensor, available: Iterable[str]) -> str:
    """The backend that `op` runs on x: `backend` itself, or for "auto" the fastest one checked on x's device.

    Raises ValueError for a backend that is not in `available`, and for "triton" where it cannot run: the error says
    why, since a slower path that nobody asked for is worse.
    """
    names = tuple(available)
    if backend == "auto":
        return "triton" if "triton" in names and _checked(x) else "torch"
    if backend not in names:
        raise ValueError(f"{op}: unknown backend {backend!r}, expected one of auto, {', '.join(names)}")
    if backend == "triton":
        _require_triton(op, x)
    return backend


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1, set before their import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in TRITON_DTYPES and TRITON_INSTALLED and _is_checked_gpu(x.device)


def _is_checked_gpu(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in CHECKED_GPUS


# As torch.compiler.assume_constant_result does, which imports the whole compiler: a second for everyone.
_is_checked_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _require_triton(op: str, x: Tensor) -> None:
    if not TRITON_INSTALLED:
        raise ValueError(f"{op}: backend 'triton' needs the package triton: pip install 'slotmamba[gpu]'")
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"{op}: backend 'triton' takes float32, bfloat16 or float16, not {x.dtype}; use 'torch'")
    if not runs_triton(x):
        raise ValueError(
            f"{op}: backend 'triton' needs tensors on a GPU, these are on {x.device}; use 'torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )


def runs_triton(x: Tensor) -> bool:
    """Whether a Triton kernel can be launched on x."""
    return x.is_cuda or (x.device.type == "cpu" and interpreting())
