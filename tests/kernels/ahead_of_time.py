"""Compiles every Triton kernel that a call launches, for a GPU that need not be there.

A call runs on CPU tensors with launches replaced by compilations: what the compiler sees (types, alignment, constants,
warps) is what a GPU would have been given. Values are garbage, so the call must not look at them. The interpreter must
be off in the process, hence the subprocess:

    python -m tests.kernels.ahead_of_time 90 tests.kernels.test_hksa_triton:CALLS
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

ARCHITECTURES = (80, 90, 100)


def compile_in_subprocess(architecture: int, calls: str) -> list[str]:
    """Runs the calls that `calls` ("module:NAME", a dictionary of functions) names; returns the kernels compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead_of_time", str(architecture), calls],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return sorted({line for line in done.stdout.splitlines() if line})


def compile_launches(architecture: int, call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that `call` launches, after each has been compiled for the architecture (90: sm_90)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from slotmamba_kernels import backends

    class NoDriver:
        """What the compiler asks a driver for."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    names: list[str] = []

    def compile_only(self: Any, grid: Any) -> Any:
        names.append(self.fn.__name__)
        return partial(self.run, grid=grid, warmup=True)

    driver.set_active(NoDriver())
    launch, runs = JITFunction.__getitem__, backends.runs_triton
    JITFunction.__getitem__ = compile_only
    backends.runs_triton = lambda x: True
    try:
        call()
    finally:
        JITFunction.__getitem__ = launch
        backends.runs_triton = runs
    return names


def main() -> None:
    module, _, name = sys.argv[2].partition(":")
    for call in getattr(importlib.import_module(module), name).values():
        print("\n".join(compile_launches(int(sys.argv[1]), call)))


if __name__ == "__main__":
    main()
