"""What the benchmarks measure with: milliseconds by CUDA events, copy bandwidth, peak memory, and tables of results."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Workload:
    """A forward pass and what its backward pass differentiates with respect to; the output is one tensor."""

    forward: Callable[[], Tensor]
    inputs: Sequence[Tensor]

    def both_ways(self) -> Callable[[], object]:
        """A function that runs forward and backward once and returns the gradients.

        The output's gradient is drawn here, once, since making it is not part of the work; of a loss it is 1.
        """
        o = self.forward()
        grad = torch.randn_like(o) if o.ndim else torch.ones_like(o)
        del o

        def run() -> object:
            return torch.autograd.grad(self.forward(), list(self.inputs), grad, allow_unused=True)

        return run

    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.inputs)


def median_ms(run: Callable[[], object], *, seconds: float = 0.4, least: int = 5, most: int = 50) -> float:
    """Median milliseconds of a call on the GPU, warm.

    Between `least` and `most` calls are queued without waiting in between, as a training step would queue them, so that
    the time to launch kernels shows only where it is longer than what they do. `seconds` bounds the whole measurement.
    """
    for _ in range(2):
        run()
    once = _event_times(run, 1)[0]
    count = min(most, max(least, int(1000 * seconds / max(once, 1e-3))))
    return statistics.median(_event_times(run, count))


def measure(make: Callable[[], Workload], *, memory: bool = False) -> dict[str, Any]:
    """Forward and backward of a workload, as cells of a row.

    `ms`; `first s`, the time of the first call, compiling and tuning included; with memory `MiB`, the most held beyond
    inputs and gradients. Where it does not run, only a `note` with the reason. Any error at all counts: a missing
    package, a card that a kernel refuses, memory. It must not end the run, because the other rows cost minutes, and it
    must be seen, so it stands in the table.
    """
    begun = time.monotonic()
    try:
        work = make()
        run = work.both_ways()
        run()
        torch.cuda.synchronize()
        cells: dict[str, Any] = {"first s": time.monotonic() - begun}
        if memory:
            cells["MiB"] = (peak_bytes(run) - work.gradient_bytes()) / 2**20
        return cells | {"ms": median_ms(run)}
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        return {"note": f"failed: {type(error).__name__}: {reason[:140]}"}


def _event_times(run: Callable[[], object], count: int) -> list[float]:
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes together: what a memory-bound kernel can reach."""
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source)) / 1000)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that a call holds beyond what is allocated before it, its result included."""
    result = run()  # compiles, and lets the libraries allocate what they keep
    del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and torch sees none")


def describe_machine() -> dict[str, str]:
    import triton

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "gpu": f"{torch.cuda.get_device_name()} (sm {capability})",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


class Report:
    """A table that is printed row by row as the results come, and kept for a JSON file.

    Args:
        columns: heading and width of each column; the first is left-aligned. A row gives the cells by heading.
    """

    def __init__(self, columns: dict[str, int]) -> None:
        self.columns = columns
        self.rows: list[dict[str, Any]] = []

    def header(self, title: str) -> None:
        print(f"\n{title}\n{self._line({name: name for name in self.columns})}", flush=True)

    def add(self, cells: dict[str, Any]) -> None:
        """Prints and keeps a row: floats with three digits, None as "-"; cells without a column go to the JSON only."""
        self.rows.append(cells)
        print(self._line({name: _text(cells.get(name)) for name in self.columns}), flush=True)

    def write_json(self, path: Path, **more: Any) -> None:
        path.write_text(json.dumps({"machine": describe_machine(), **more, "rows": self.rows}, indent=1) + "\n")

    def _line(self, cells: dict[str, str]) -> str:
        first, *rest = self.columns.items()
        return "  ".join(
            [f"{cells[first[0]]:<{first[1]}}", *(f"{cells[name]:>{width}}" for name, width in rest)]
        ).rstrip()


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
