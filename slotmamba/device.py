"""Where to compute, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from slotmamba.errors import InputError


def choose_device(wanted: str, key: str) -> torch.device:
    """The device that ``wanted`` means: `cpu`, `cuda`, or `auto`, a GPU when there is one.

    Args:
        key: recipe key or option that asks for it, for the error.

    Raises:
        InputError: cuda without a GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key}=cuda: torch finds no CUDA GPU here; use {key}=cpu or auto")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def compute_precision(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """A context that computes in ``precision``, the recipe's train.precision: fp32, or bf16 by autocast."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
