"""SSD by the Triton kernels of the package mamba-ssm, which run on CUDA."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

HOW_TO_INSTALL = (
    "install the extra `gpu` and transformers (pip install 'slotmamba[gpu]' transformers), then mamba-ssm itself, "
    "which no extra can hold because its build needs torch: MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
    "pip install --no-deps --no-build-isolation mamba-ssm"
)


def ssd_mamba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """See `slotmamba_kernels.ssd`; x, B and C share one dtype, the others are float32."""
    scan = _load()
    y, leaving = scan(x, dt, A, B, C, chunk_size, D=D, initial_states=state, return_final_states=True)
    return y, leaving


@functools.cache
def mamba_installed() -> bool:
    """Whether mamba-ssm is there and can be imported; warns when it is there and cannot."""
    try:
        _load()
    except ImportError as error:
        if getattr(error, "name", None) != "mamba_ssm":
            warnings.warn(
                f"mamba-ssm is installed but does not import, its kernels are not used: {error}", stacklevel=2
            )
        return False
    return True


@functools.cache
def _load() -> Callable[..., Any]:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ModuleNotFoundError as error:
        if error.name != "selective_scan_cuda":
            raise
        # mamba-ssm 2.3.2.post1 imports the compiled scan of Mamba-1 even when it was built without it. Nothing here
        # calls that scan, so an empty module in its place, for as long as the import takes, lets the rest load. What
        # the failed import left goes first: the second would build on it and never run the package's own code.
        for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            del sys.modules[name]
        sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
        finally:
            del sys.modules["selective_scan_cuda"]
    return mamba_chunk_scan_combined
