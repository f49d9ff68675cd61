"""States of the random number generators as JSON."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """States of Python's, numpy's (the global legacy one) and torch's generators, of every CUDA device in use."""
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(key).tolist(), position, has_gauss, cached_gauss],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(state) for state in cuda],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned.

    A change in the number of CUDA devices is allowed, with a warning: the devices that both have are restored.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state((kind, np.array(key, dtype=np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(_from_hex(state["torch"]))
    available = torch.cuda.device_count()
    if state["cuda"] and len(state["cuda"]) != available:
        logger.warning(
            "the checkpoint has the random states of %d CUDA devices, here are %d: random numbers on a GPU will differ "
            "from those of an uninterrupted run",
            len(state["cuda"]),
            available,
        )
    for device, cuda_state in enumerate(state["cuda"][:available]):
        torch.cuda.set_rng_state(_from_hex(cuda_state), device)


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
