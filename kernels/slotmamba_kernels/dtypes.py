"""Which precision the ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and weights for inputs like `x`: float32, or float64 where the inputs are float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
