"""How long HKSA's event plan takes on a GPU, beside a stable torch.sort of the same events; then kernel by kernel.

    PYTHONPATH=kernels python kernels/benchmarks/plan.py

`plan` is a call from Python, `graph` its kernels replayed as a CUDA graph, without the gaps between launches; `sort` is
torch.sort of the events' slots alone, ready in its layout, also as a graph. Medians in microseconds. Each timing goes
over several sets of addresses that together exceed the second-level cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from slotmamba_kernels.hksa.event_plan import make_event_plan

DEVICE = torch.device("cuda")
SETS = 4
REPEATS = 30

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """K active slots a token and head for writing and as many for reading, of M slots; `zipf` by weights 1/(m+1)."""

    name: str
    batch: int
    tokens: int
    num_slots: int
    zipf: bool = False
    heads: int = 8
    active: int = 8

    def addresses(self) -> Tensor:
        """[B, T, H, K] distinct slots, in random order."""
        rows = self.batch * self.tokens * self.heads
        if self.zipf:
            weights = 1 / torch.arange(1, self.num_slots + 1, device=DEVICE)
            slots = weights.expand(rows, -1).multinomial(self.active)
        else:
            # Sorted numbers with repetition, pulled apart: distinct whatever num_slots is.
            apart = torch.arange(self.active, device=DEVICE)
            free = torch.randint(self.num_slots - self.active + 1, (rows, self.active), device=DEVICE)
            slots = (free.sort(1).values + apart).gather(1, torch.rand(rows, self.active, device=DEVICE).argsort(1))
        return slots.int().view(self.batch, self.tokens, self.heads, self.active)


CASES = [
    Case("B=8 T=4096 M=1024", 8, 4096, 1024),
    Case("B=1 T=4096 M=256", 1, 4096, 256),
    Case("B=1 T=4096 M=256 Zipf", 1, 4096, 256, zipf=True),
    Case("B=1 T=32768 M=4^10", 1, 32768, 4**10),
    Case("B=8 T=4096 M=4^6", 8, 4096, 4**6),
    Case("B=32 T=1024 M=1024", 32, 1024, 1024),
]


def median_us(calls: list[Call]) -> float:
    """Median time of one call, over the calls in turn."""
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def graph_us(calls: list[Call]) -> float:
    """The same for the kernels that the calls launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_us([graph.replay]) / len(calls)


def stream_keys(write_idx: Tensor, read_idx: Tensor, num_slots: int) -> Tensor:
    """[2, B, H, T*K]: what is sorted, in the smallest type that holds it."""
    keys = torch.stack([write_idx, read_idx]).transpose(2, 3).flatten(3)
    return keys.to(torch.int16 if num_slots <= 2**15 else torch.int32).contiguous()


def measure(case: Case) -> tuple[float, float, float]:
    addresses = [(case.addresses(), case.addresses()) for _ in range(SETS)]
    plans: list[Call] = [partial(make_event_plan, *pair, case.num_slots) for pair in addresses]
    keys = [stream_keys(*pair, case.num_slots) for pair in addresses]
    sorts: list[Call] = [partial(torch.sort, x, dim=-1, stable=True) for x in keys]
    for call in plans + sorts:  # compiles, and leaves memory to reuse
        call()
    return median_us(plans), graph_us(plans), graph_us(sorts)


def kernel_times(case: Case) -> list[tuple[str, float]]:
    """Mean time of each kernel of a plan, microseconds."""
    addresses = [(case.addresses(), case.addresses()) for _ in range(SETS)]
    make_event_plan(*addresses[0], case.num_slots)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            for pair in addresses:
                make_event_plan(*pair, case.num_slots)
        torch.cuda.synchronize()
    calls = REPEATS * SETS
    return [
        (event.key, event.device_time_total / calls) for event in profiler.key_averages() if event.device_time_total
    ]


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'H=8 K=8':<24}{'plan':>10}{'graph':>10}{'sort':>10}   us")
    for case in CASES:
        plan, graph, sort = measure(case)
        print(f"{case.name:<24}{plan:>10.1f}{graph:>10.1f}{sort:>10.1f}")
    for case in (CASES[0], CASES[3]):
        print(f"\n{case.name}: {', '.join(f'{name} {us:.1f}' for name, us in kernel_times(case))}")


if __name__ == "__main__":
    main()
